//! Files of every version still open, and are still written byte for byte: `fixtures/` is never rewritten.
//!
//! If one of these digests changes, bytes on disk changed: that needs another format version, fixtures of its own and a
//! line in the changelog.

use std::path::PathBuf;
use std::sync::Arc;

use unbroken::Digest;
use unbroken::digest::Assembly;
use unbroken::format::journal::{
    Component, Ending, Record, SegmentHeader, SegmentReader, encode_header, encode_record,
};
use unbroken::format::manifest::{
    self, Coded, Layer, Manifest, PackEntry, Piece, Pieces, Place, Source, StorageEntry,
};
use unbroken::format::pack::{self, PackTensor};
use unbroken::format::saved::{self, Content, Node, Outline, SAVED, Saved};
use unbroken::journal::Story;
use unbroken::state::{Object, Tensor, Value};
use unbroken::storage::memory::MemoryStorage;
use unbroken::storage::{Directory, Storage};
use unbroken::store::Checkpoint;

const PACK: &str = "00112233445566778899aabbccddeeff.safetensors";
const MANIFEST: &str = "000000002-0-90185f13fcab361d";
const JOURNAL: &str = "000001.journal";
/// A journal with the digests of leaves, which the first files of version 1 do not have.
const SAVES: &str = "saved/000001.journal";

/// A manifest of version 2: a storage in pieces, in two packs.
const IN_PIECES: &str = "checkpoints/000000003-0-908df25e26af0614";
const PACKS_OF_PIECES: [&str; 2] = [
    "objects/10112233445566778899aabbccddeeff.safetensors",
    "objects/20112233445566778899aabbccddeeff.safetensors",
];

/// A manifest of version 3: a storage as differences to another one, both compressed.
const CODED: &str = "checkpoints/000000004-0-fd1b377b18e75cbc";
const PACKS_OF_LAYERS: [&str; 2] = [
    "objects/30112233445566778899aabbccddeeff.safetensors",
    "objects/40112233445566778899aabbccddeeff.safetensors",
];

fn path_of(version: &str, name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "..", "..", "fixtures", version, name]
        .iter()
        .collect()
}

fn fixture(name: &str) -> Vec<u8> {
    read(path_of("v1", name))
}

fn read(path: PathBuf) -> Vec<u8> {
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn text(text: &str) -> Value {
    Value::Str(text.to_owned())
}

/// Three storages, their names in the pack and their bytes.
fn storages() -> Vec<(PackTensor, Vec<u8>)> {
    let weight = [1.0f32, -0.0, 0.5, f32::INFINITY, 1e-40, 3.25]
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect();
    vec![
        (pack::describe("generator".into(), 5, None), vec![5, 4, 3, 2, 1]),
        (
            pack::describe("model/weight".into(), 24, Some(("float32", &[2, 3]))),
            weight,
        ),
        (
            pack::describe("step".into(), 8, Some(("int64", &[]))),
            2i64.to_le_bytes().to_vec(),
        ),
    ]
}

fn pack_file() -> (Vec<u8>, pack::PackLayout) {
    let tensors: Vec<PackTensor> = storages().into_iter().map(|(tensor, _)| tensor).collect();
    let layout = pack::plan(&tensors).unwrap();
    let mut bytes = layout.header.clone();
    layout
        .order
        .iter()
        .for_each(|&index| bytes.extend(&storages()[index].1));
    (bytes, layout)
}

fn records() -> Vec<Record> {
    let boundary = |step: u64| Record::Boundary {
        step,
        phase: 0,
        epoch: 0,
        position: step,
        components: vec![
            ("data/indices".into(), Component::Digest(vec![step as u8; 16])),
            ("log/loss".into(), Component::Float((1.0 / step as f64).to_bits())),
            ("log/count".into(), Component::Int(-7)),
            ("log/note".into(), Component::Text("ok".into())),
        ],
    };
    let event = Record::Event {
        kind: "mark".into(),
        step: 1,
        fields: vec![("why".into(), text("fixture"))],
        time: "2026-11-23T10:00:01Z".into(),
    };
    vec![boundary(1), event, boundary(2)]
}

fn header() -> SegmentHeader {
    SegmentHeader {
        run_id: "0f3c9a2e77d14b60".into(),
        life: 1,
        step: 0,
        phase: 0,
        previous: Digest([0; 32]),
        created: "2026-11-23T10:00:00Z".into(),
    }
}

fn journal_file() -> (Vec<u8>, Digest) {
    let (mut bytes, mut chain) = encode_header(&header()).unwrap();
    for record in records() {
        let (next, after) = encode_record(&chain, &record).unwrap();
        bytes.extend(next);
        chain = after;
    }
    (bytes, chain)
}

/// Two checkpoints' leaves: nodes stand with the first only.
fn saves() -> Vec<(Saved, Outline)> {
    let node = |path: &str, what: &str, layout: &str, leaf| Node {
        path: path.into(),
        what: what.into(),
        layout: layout.into(),
        leaf,
    };
    let nodes = Arc::new(vec![
        node("", "dict", "", false),
        node("w", "float32 [2, 3] on cpu, requires_grad True", "", true),
        node(
            "wt",
            "float32 [3, 2] on cpu",
            "strides [1, 3] from element 0, memory shared with `w`",
            true,
        ),
        node("step", "int", "", true),
    ]);
    let save = |step: u8| {
        let saved = Saved {
            checkpoint: format!("00000000{step}-0-90185f13fcab361d"),
            phase: 0,
            durable_us: 12_345,
            commit_us: 4_567,
            size_bytes: 24,
            new_bytes: 128,
        };
        let contents = (0..3).map(|leaf| Some(Content([16 * step + leaf; 16]))).collect();
        let nodes = Arc::clone(&nodes);
        (saved, Outline { nodes, contents })
    };
    vec![save(1), save(2)]
}

fn saves_file() -> Vec<u8> {
    let (mut bytes, mut chain) = encode_header(&header()).unwrap();
    let mut written = None;
    for (index, (saved, outline)) in saves().into_iter().enumerate() {
        let fields = saved::lower(&saved, &outline, written.as_ref()).unwrap();
        written = Some(outline.nodes);
        let record = Record::Event {
            kind: SAVED.into(),
            step: index as u64 + 1,
            fields,
            time: "2026-11-23T10:00:02Z".into(),
        };
        let (next, after) = encode_record(&chain, &record).unwrap();
        bytes.extend(next);
        chain = after;
    }
    bytes
}

fn manifest() -> Manifest {
    let (pack, layout) = pack_file();
    let view = |dtype: &str, shape: &[u64], strides: &[i64], storage: u32| {
        let attrs = vec![("requires_grad".into(), Value::Bool(true))];
        let (shape, strides) = (shape.to_vec(), strides.to_vec());
        Value::from(Tensor {
            dtype: dtype.into(),
            shape,
            strides,
            offset: 0,
            storage,
            device: "cpu".into(),
            attrs,
        })
    };
    let every_sort = Value::List(vec![
        Value::None,
        Value::Int(i64::MIN),
        Value::integer(true, &[1; 12]),
        Value::Float(0x7ff8_dead_beef_0001),
        Value::Complex(0, 1 << 63),
        Value::Bytes(vec![0, 255]),
        Value::Tuple(vec![Value::Int(1), text("é")]),
        Value::Set(vec![Value::Int(3), text("a")]),
        Value::FrozenSet(vec![]),
        Value::dict(vec![
            (Value::Int(2), Value::Bool(false)),
            (text("1"), Value::None),
        ]),
        Value::from(Object {
            kind: "enum".into(),
            name: "app.Mode".into(),
            fields: vec![("name".into(), text("FAST"))],
        }),
    ]);
    let tree = vec![
        (text("generator"), view("uint8", &[5], &[1], 0)),
        (
            text("model"),
            Value::dict(vec![(text("weight"), view("float32", &[3, 2], &[1, 3], 1))]),
        ),
        (text("step"), view("int64", &[], &[], 2)),
        (text("values"), every_sort),
    ];
    let entry = |(index, (_, bytes)): (usize, (PackTensor, Vec<u8>))| StorageEntry {
        digest: Digest::of(&bytes),
        length: bytes.len() as u64,
        place: Place::Whole {
            pack: 0,
            offset: layout.offsets[index],
        },
    };
    let pack = PackEntry {
        name: PACK.into(),
        length: pack.len() as u64,
        header_digest: layout.header_digest,
    };
    Manifest {
        run_id: "0f3c9a2e77d14b60".into(),
        step: 2,
        phase: 0,
        parent: Some("000000000-0-0123456789abcdef".into()),
        life: 1,
        created: "2026-11-23T10:00:02Z".into(),
        tree: Value::dict(tree),
        storages: storages().into_iter().enumerate().map(entry).collect(),
        new_bytes: pack.length,
        packs: vec![pack],
        identity: vec![("workers".into(), Value::Int(2))],
        environment: vec![("torch".into(), text("2.15.0"))],
        metrics: vec![("loss".into(), 0.5f64.to_bits())],
        pinned: true,
        journal_head: journal_file().1,
    }
}

#[test]
fn files_of_version_1_still_open() {
    let (found, digest) = manifest::decode(&fixture(MANIFEST)).unwrap();
    assert_eq!(found, manifest());
    assert_eq!(
        manifest::checkpoint_name(found.step, found.phase, &digest),
        MANIFEST
    );

    let bytes = fixture(PACK);
    let header = pack::header_length(bytes[..8].try_into().unwrap()).unwrap() as usize;
    assert_eq!(Digest::of(&bytes[..header]), found.packs[0].header_digest);
    for packed in pack::parse(&bytes[..header], bytes.len() as u64).unwrap() {
        let stored = &bytes[packed.offset as usize..(packed.offset + packed.length) as usize];
        assert!(storages().contains(&(packed.tensor, stored.to_vec())));
    }
    for storage in &found.storages {
        let (_, start) = storage.place.whole().unwrap();
        let (start, end) = (start as usize, (start + storage.length) as usize);
        assert_eq!(Digest::of(&bytes[start..end]), storage.digest);
    }

    let bytes = fixture(JOURNAL);
    let mut reader = SegmentReader::new(bytes.as_slice()).unwrap();
    assert_eq!(
        reader
            .by_ref()
            .map(|entry| entry.unwrap().record)
            .collect::<Vec<_>>(),
        records()
    );
    assert_eq!(reader.head(), found.journal_head);
    assert_eq!(reader.ending().unwrap(), Ending::Complete);
}

#[test]
fn the_digests_of_leaves_in_a_journal_of_version_1_can_be_read() {
    let memory = MemoryStorage::new();
    memory.create_dir("journal").unwrap();
    memory.put("journal/000001.journal", fixture(SAVES));
    let story = Story::open(&Directory::new(Arc::new(memory)), &header().run_id).unwrap();
    assert!(story.warnings.is_empty(), "{:?}", story.warnings);
    let found: Vec<(Saved, Outline)> = story
        .saves
        .iter()
        .map(|save| (save.saved.clone(), story.outline(save).unwrap().unwrap()))
        .collect();
    assert_eq!(found, saves());
    assert!(story.boundaries().next().is_none());
}

#[test]
fn files_of_version_1_are_still_written_byte_for_byte() {
    for (name, bytes, digest) in [
        (PACK, pack_file().0, "11088939f25716d5"),
        (JOURNAL, journal_file().0, "ff491cb729e2fb0a"),
        (SAVES, saves_file(), "1d77fbb403c5ad6f"),
        (
            MANIFEST,
            manifest::encode(&manifest()).unwrap().0,
            "9a0286c154389055",
        ),
    ] {
        assert_eq!(Digest::of(&bytes).short(), digest, "{name}");
        assert_eq!(bytes, fixture(name), "{name}");
    }
}

/// A table of three chunks, the last one of 10 bytes: as the first pack has it, and with its second chunk changed.
fn tables() -> [Vec<u8>; 2] {
    let before: Vec<u8> = (0..2 * 4096 + 10u32).map(|index| (index / 16) as u8).collect();
    let mut after = before.clone();
    after[4096] = 255;
    [before, after]
}

/// The packs: the whole first table, and the second one's second chunk.
fn packs_of_pieces() -> [(Vec<u8>, pack::PackLayout); 2] {
    let [before, after] = tables();
    let chunk = &after[4096..2 * 4096];
    let whole = pack::describe("table".into(), before.len() as u64, Some(("uint8", &[8202])));
    let changed = pack::describe("table (changed chunks)".into(), 4096, None);
    [(whole, before.as_slice()), (changed, chunk)].map(|(tensor, bytes)| {
        let layout = pack::plan(&[tensor]).unwrap();
        ([&layout.header, bytes].concat(), layout)
    })
}

fn manifest_in_pieces() -> Manifest {
    let [_, table] = tables();
    let packs = packs_of_pieces();
    let chunks = Assembly::of_groups(table.len() as u64, 4096);
    chunks.put(0, &table);
    let (old, new) = (packs[0].1.offsets[0], packs[1].1.offsets[0]);
    let piece = |source, offset, length| Piece {
        source,
        offset,
        length,
    };
    let place = Place::Pieces(Pieces {
        chunk: 4096,
        sources: vec![
            Source {
                pack: 0,
                check: chunks.digest_of_values([0..1, 2..3].into_iter()),
            },
            Source {
                pack: 1,
                check: chunks.digest_of_values(std::iter::once(1..2)),
            },
        ],
        pieces: vec![
            piece(0, old, 4096),
            piece(1, new, 4096),
            piece(0, old + 2 * 4096, 10),
        ],
    });
    let names = PACKS_OF_PIECES.map(|name| name.strip_prefix("objects/").unwrap());
    let entry = |((bytes, layout), name): (&(Vec<u8>, pack::PackLayout), &str)| PackEntry {
        name: name.into(),
        length: bytes.len() as u64,
        header_digest: layout.header_digest,
    };
    let view = Value::from(Tensor {
        dtype: "uint8".into(),
        shape: vec![8202],
        strides: vec![1],
        offset: 0,
        storage: 0,
        device: "cpu".into(),
        attrs: vec![],
    });
    Manifest {
        step: 3,
        parent: Some(MANIFEST.into()),
        tree: Value::dict(vec![(text("table"), view)]),
        storages: vec![StorageEntry {
            digest: Digest::of(&table),
            length: table.len() as u64,
            place,
        }],
        packs: packs.iter().zip(names).map(entry).collect(),
        new_bytes: packs[1].0.len() as u64,
        ..manifest()
    }
}

#[test]
fn files_of_version_2_still_open_and_are_still_written_byte_for_byte() {
    let (bytes, digest) = manifest::encode(&manifest_in_pieces()).unwrap();
    for (name, bytes) in [IN_PIECES, PACKS_OF_PIECES[0], PACKS_OF_PIECES[1]]
        .into_iter()
        .zip([
            bytes,
            packs_of_pieces()[0].0.clone(),
            packs_of_pieces()[1].0.clone(),
        ])
    {
        assert_eq!(bytes, read(path_of("v2", name)), "{name}");
    }
    assert_eq!(
        format!("checkpoints/{}", manifest::checkpoint_name(3, 0, &digest)),
        IN_PIECES
    );
    let checkpoint = Checkpoint::open(&path_of("v2", IN_PIECES)).unwrap();
    assert_eq!(checkpoint.manifest(), &manifest_in_pieces());
    checkpoint.verify().unwrap();
    assert!(checkpoint.read(0).unwrap() == tables()[1]);
}

/// 3000 numbers that are no round ones, before and after a small step; two bytes behind them are no number.
fn weights() -> [Vec<u8>; 2] {
    [1.0f32, 1.001].map(|factor| {
        let numbers = (0..3000u32).map(|index| (index as f32 * 0.37 - 500.0) / 1024.0 * factor);
        numbers.flat_map(f32::to_le_bytes).chain([1, 2]).collect()
    })
}

/// What the fixtures hold as the frames of the one block; their bytes are zstd's, and another release of it may choose
/// others for the same numbers, so that they are read and not written here.
fn frames() -> [Vec<u8>; 2] {
    PACKS_OF_LAYERS.map(|name| {
        let bytes = read(path_of("v3", name));
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        bytes[header..].to_vec()
    })
}

fn packs_of_layers() -> [(Vec<u8>, pack::PackLayout); 2] {
    frames().map(|frame| {
        let tensor = pack::describe("weight (compressed)".into(), frame.len() as u64, None);
        let layout = pack::plan(&[tensor]).unwrap();
        ([&layout.header, &frame[..]].concat(), layout)
    })
}

fn coded_manifest() -> Manifest {
    let [_, weight] = weights();
    let (packs, frames) = (packs_of_layers(), frames());
    let layers = frames
        .iter()
        .zip(&packs)
        .zip(0..)
        .map(|((frame, (_, layout)), pack)| Layer {
            pack,
            check: Digest::of(&Digest::of(frame).0),
            offset: layout.offsets[0],
            frames: vec![frame.len() as u64],
        });
    let place = Place::Coded(Coded {
        width: 4,
        layers: layers.collect(),
    });
    let view = Value::from(Tensor {
        dtype: "float32".into(),
        shape: vec![3000],
        strides: vec![1],
        offset: 0,
        storage: 0,
        device: "cpu".into(),
        attrs: vec![],
    });
    let names = PACKS_OF_LAYERS.map(|name| name.strip_prefix("objects/").unwrap());
    let entry = |((bytes, layout), name): (&(Vec<u8>, pack::PackLayout), &str)| PackEntry {
        name: name.into(),
        length: bytes.len() as u64,
        header_digest: layout.header_digest,
    };
    Manifest {
        step: 4,
        parent: Some(IN_PIECES.strip_prefix("checkpoints/").unwrap().into()),
        tree: Value::dict(vec![(text("weight"), view)]),
        storages: vec![StorageEntry {
            digest: Digest::of(&weight),
            length: weight.len() as u64,
            place,
        }],
        packs: packs.iter().zip(names).map(entry).collect(),
        new_bytes: packs[1].0.len() as u64,
        ..manifest()
    }
}

#[test]
fn files_of_version_3_still_open_and_all_but_their_frames_are_still_written_byte_for_byte() {
    let [first, second] = packs_of_layers();
    let (bytes, digest) = manifest::encode(&coded_manifest()).unwrap();
    assert_eq!(
        format!("checkpoints/{}", manifest::checkpoint_name(4, 0, &digest)),
        CODED
    );
    for (name, bytes) in [
        (CODED, bytes),
        (PACKS_OF_LAYERS[0], first.0),
        (PACKS_OF_LAYERS[1], second.0),
    ] {
        assert_eq!(bytes, read(path_of("v3", name)), "{name}");
    }
    assert!(frames()[1].len() < frames()[0].len() && frames()[0].len() < 12_002);
    let checkpoint = Checkpoint::open(&path_of("v3", CODED)).unwrap();
    assert_eq!(checkpoint.manifest(), &coded_manifest());
    checkpoint.verify().unwrap();
    assert!(checkpoint.read(0).unwrap() == weights()[1]);
}
