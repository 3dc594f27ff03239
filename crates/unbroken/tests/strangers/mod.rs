//! What a stranger's bytes are put through: each decoder, and a whole run directory. The fuzz targets and the tests share
//! these.
//!
//! Touches: memory only. Each function panics where a promise is broken, and only there. What a stranger can seal (every
//! digest is without a key) is sealed here too, so that the checks behind the digests are reached.
#![allow(dead_code)] // Each program uses a part of it.

use std::path::Path;
use std::sync::Arc;

use arbitrary::{Result, Unstructured};
use unbroken::certificate::Certificate;
use unbroken::digest::{Assembly, Digest, Hasher};
use unbroken::format::coded::{self, BLOCK, Coder, Decoder, Planes, WIDTHS};
use unbroken::format::journal::{self, Component, Record, SegmentHeader, SegmentReader};
use unbroken::format::manifest::{
    self, Coded, Layer, Manifest, PackEntry, Piece, Pieces, Place, Source, StorageEntry,
};
use unbroken::format::{pack, value};
use unbroken::run::{Options, Run};
use unbroken::state::{Object, Tensor, Value};
use unbroken::storage::Storage;
use unbroken::storage::memory::MemoryStorage;

/// Bytes of a chunk of a storage in pieces.
const CHUNK: u64 = 4096;

/// Any value, also ones that the format refuses.
pub fn any_value(bytes: &mut Unstructured, depth: usize) -> Result<Value> {
    let leaves = 8;
    let sort = bytes.int_in_range(0..=if depth == 0 { leaves } else { leaves + 7 })?;
    Ok(match sort {
        0 => Value::None,
        1 => Value::Bool(bytes.arbitrary()?),
        2 => Value::Int(bytes.arbitrary()?),
        3 => Value::BigInt {
            negative: bytes.arbitrary()?,
            magnitude: bytes.arbitrary()?,
        },
        4 => Value::Float(bytes.arbitrary()?),
        5 => Value::Complex(bytes.arbitrary()?, bytes.arbitrary()?),
        6 => Value::Str(bytes.arbitrary()?),
        7 => Value::Bytes(bytes.arbitrary()?),
        8 => Value::from(any_tensor(bytes, depth)?),
        9 => Value::List(any_values(bytes, depth)?),
        10 => Value::Tuple(any_values(bytes, depth)?),
        11 => Value::Set(any_values(bytes, depth)?),
        12 => Value::FrozenSet(any_values(bytes, depth)?),
        13 => Value::dict(
            any_values(bytes, depth)?
                .into_iter()
                .map(|item| Ok((any_value(bytes, 0)?, item)))
                .collect::<Result<_>>()?,
        ),
        _ => Value::from(Object {
            kind: bytes.arbitrary()?,
            name: bytes.arbitrary()?,
            fields: any_fields(bytes, depth)?,
        }),
    })
}

fn any_values(bytes: &mut Unstructured, depth: usize) -> Result<Vec<Value>> {
    let count = bytes.int_in_range(0..=4)?;
    (0..count).map(|_| any_value(bytes, depth - 1)).collect()
}

fn any_fields(bytes: &mut Unstructured, depth: usize) -> Result<Vec<(String, Value)>> {
    let count = bytes.int_in_range(0..=3)?;
    (0..count)
        .map(|_| Ok((bytes.arbitrary()?, any_value(bytes, depth.saturating_sub(1))?)))
        .collect()
}

fn any_tensor(bytes: &mut Unstructured, depth: usize) -> Result<Tensor> {
    let dimensions = bytes.int_in_range(0..=5)?;
    let strides = if bytes.ratio(1, 20)? { 1 } else { dimensions };
    let dtypes = [
        "float32",
        "bool",
        "complex128",
        "float8_e4m3fn",
        "of the front's own",
        "",
    ];
    Ok(Tensor {
        dtype: (*bytes.choose(&dtypes)?).to_owned(),
        shape: (0..dimensions).map(|_| any_size(bytes)).collect::<Result<_>>()?,
        strides: (0..strides).map(|_| bytes.arbitrary()).collect::<Result<_>>()?,
        offset: any_size(bytes)?,
        storage: bytes.int_in_range(0..=3)?,
        device: "cpu".to_owned(),
        attrs: any_fields(bytes, depth)?,
    })
}

/// Small, or as large as can be.
fn any_size(bytes: &mut Unstructured) -> Result<u64> {
    if bytes.ratio(9, 10)? {
        bytes.int_in_range(0..=12)
    } else {
        bytes.arbitrary()
    }
}

/// A decoded value is exactly its bytes; a value that is written is read back.
pub fn values(bytes: &[u8]) {
    if let Ok(found) = value::decode(bytes) {
        assert_eq!(
            value::encode(&found).expect("what was read can be written"),
            bytes
        );
    }
    if let Ok(any) = any_value(&mut Unstructured::new(bytes), 6)
        && let Ok(encoded) = value::encode(&any)
    {
        let found = value::decode(&encoded).expect("what was written can be read");
        assert_eq!(value::encode(&found).as_ref(), Ok(&encoded));
    }
}

/// A manifest around any payload, whole.
pub fn seal_manifest(version: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"UNBRKMAN".to_vec();
    bytes.extend(version.to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    bytes.extend(payload);
    let digest = Digest::of(&bytes);
    bytes.extend(digest.0);
    bytes
}

/// In one piece, coded, or in some pieces, of which many could be.
fn any_place(bytes: &mut Unstructured) -> Result<Place> {
    if bytes.ratio(1, 2)? {
        return Ok(Place::Whole {
            pack: bytes.int_in_range(0..=3)?,
            offset: any_size(bytes)?,
        });
    }
    if bytes.ratio(1, 2)? {
        return any_coded(bytes);
    }
    let (sources, pieces) = (bytes.int_in_range(0..=3)?, bytes.int_in_range(0..=4)?);
    let chunk = *bytes.choose(&[4096, 8192, 65536, 0, 12_288, u64::MAX])?;
    Ok(Place::Pieces(Pieces {
        chunk,
        sources: (0..sources)
            .map(|_: u8| {
                Ok(Source {
                    pack: bytes.int_in_range(0..=3)?,
                    check: Digest(bytes.arbitrary()?),
                })
            })
            .collect::<Result<_>>()?,
        pieces: (0..pieces)
            .map(|_: u8| {
                Ok(Piece {
                    source: bytes.int_in_range(0..=3)?,
                    offset: any_size(bytes)?,
                    length: chunk.wrapping_mul(bytes.int_in_range(0..=3)?),
                })
            })
            .collect::<Result<_>>()?,
    }))
}

fn any_coded(bytes: &mut Unstructured) -> Result<Place> {
    let layers = bytes.int_in_range(0..=3)?;
    let layer = |bytes: &mut Unstructured| {
        let frames: u8 = bytes.int_in_range(0..=3)?;
        Ok(Layer {
            pack: bytes.int_in_range(0..=3)?,
            check: Digest(bytes.arbitrary()?),
            offset: any_size(bytes)?,
            frames: (0..frames).map(|_| any_size(bytes)).collect::<Result<_>>()?,
        })
    };
    Ok(Place::Coded(Coded {
        width: *bytes.choose(&[1, 2, 4, 8, 3, u64::MAX])?,
        layers: (0..layers).map(|_: u8| layer(bytes)).collect::<Result<_>>()?,
    }))
}

fn any_manifest(bytes: &mut Unstructured) -> Result<Manifest> {
    let digest = |bytes: &mut Unstructured| Ok(Digest(bytes.arbitrary()?));
    let (packs, storages) = (bytes.int_in_range(0..=3)?, bytes.int_in_range(0..=3)?);
    let packs = (0..packs).map(|index: u8| {
        Ok(PackEntry {
            name: match bytes.int_in_range(0..=9)? {
                0 => bytes.arbitrary()?,
                1 => "../lock".to_owned(),
                _ => format!("{index:032x}.safetensors"),
            },
            length: any_size(bytes)?,
            header_digest: digest(bytes)?,
        })
    });
    let packs = packs.collect::<Result<_>>()?;
    let storages = (0..storages).map(|_: u8| {
        Ok(StorageEntry {
            digest: digest(bytes)?,
            length: any_size(bytes)?,
            place: any_place(bytes)?,
        })
    });
    let storages = storages.collect::<Result<_>>()?;
    Ok(Manifest {
        run_id: "stranger".to_owned(),
        step: any_size(bytes)?,
        phase: bytes.int_in_range(0..=3)?,
        parent: None,
        life: bytes.int_in_range(0..=3)?,
        created: "2026-11-23T10:00:00Z".to_owned(),
        tree: any_value(bytes, 4)?,
        storages,
        packs,
        identity: any_fields(bytes, 2)?,
        environment: any_fields(bytes, 2)?,
        metrics: Vec::new(),
        pinned: bytes.arbitrary()?,
        journal_head: digest(bytes)?,
        new_bytes: any_size(bytes)?,
    })
}

/// A decoded manifest is exactly its bytes, also where a stranger made its digest.
pub fn manifests(bytes: &[u8]) {
    let again = |bytes: &[u8]| {
        if let Ok((found, digest)) = manifest::decode(bytes) {
            let written = manifest::encode(&found).expect("what was read can be written");
            assert_eq!(written, (bytes.to_vec(), digest));
        }
    };
    again(bytes);
    again(&seal_manifest(1, bytes));
    again(&seal_manifest(2, bytes));
    again(&seal_manifest(3, bytes));
    if let Ok(any) = any_manifest(&mut Unstructured::new(bytes))
        && let Ok((encoded, _)) = manifest::encode(&any)
    {
        manifest::decode(&encoded).expect("what was written can be read");
        again(&encoded);
    }
}

/// A frame makes a block of the length that was asked for, or none; a block that was coded is the block again. `bytes`
/// are both, behind a width and a length.
pub fn frames(bytes: &[u8]) {
    let [width, length, high, bytes @ ..] = bytes else {
        return;
    };
    let width = WIDTHS[usize::from(width % 4)] as usize;
    let length = usize::from(u16::from_le_bytes([*length, *high])) * 5;
    let mut decoder = Decoder::default();
    let _ = decoder.decode(bytes, width, &mut vec![0; length]);
    let (half, base) = (bytes.len() / 2, bytes.len() / 2 * 2);
    let mut block = bytes[..half].to_vec();
    coded::subtract(&mut block, &bytes[half..base], width);
    let frame = Coder::default().encode(&block, width, Planes::ALL).to_vec();
    let mut again = vec![7; half];
    decoder
        .decode(&frame, width, &mut again)
        .expect("what was coded can be read");
    coded::add(&mut again, &bytes[half..base], width);
    assert_eq!(again, bytes[..half]);
}

/// A pack header that is read lists what lies inside the file, in its place.
pub fn packs(bytes: &[u8]) {
    let read = |header: &[u8], length: u64| {
        let Ok(tensors) = pack::parse(header, length) else {
            return;
        };
        for tensor in &tensors {
            assert!(tensor.offset >= header.len() as u64);
            assert!(
                tensor
                    .offset
                    .checked_add(tensor.length)
                    .is_some_and(|end| end <= length)
            );
        }
        let sum: u64 = tensors.iter().map(|tensor| tensor.length).sum();
        assert_eq!(header.len() as u64 + sum, length);
    };
    read(bytes, bytes.len() as u64);
    // As a stranger would frame it: length in front, padded to the alignment.
    let mut header = bytes.to_vec();
    header.resize((bytes.len() + 8).next_multiple_of(64) - 8, b' ');
    header.splice(0..0, (header.len() as u64).to_le_bytes());
    for data in [0, 1, 24, u64::from(u32::MAX)] {
        read(&header, header.len() as u64 + data);
    }
}

/// A segment of a stranger's run that starts at step 0, and the chain hash that a record continues.
pub fn segment_start() -> (Vec<u8>, Digest) {
    let header = SegmentHeader {
        run_id: "stranger".to_owned(),
        life: 1,
        step: 0,
        phase: 0,
        previous: Digest([0; 32]),
        created: "2026-11-23T10:00:00Z".to_owned(),
    };
    journal::encode_header(&header).expect("a plain header can be written")
}

/// A record around any payload, whole.
pub fn seal_record(previous: &Digest, payload: &[u8]) -> (Vec<u8>, Digest) {
    let chain = Hasher::new().update(&previous.0).update(payload).finish();
    let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
    bytes.extend(payload);
    bytes.extend(chain.0);
    (bytes, chain)
}

fn any_record(bytes: &mut Unstructured) -> Result<Record> {
    if bytes.arbitrary()? {
        return Ok(Record::Event {
            kind: bytes.arbitrary()?,
            step: any_size(bytes)?,
            fields: any_fields(bytes, 3)?,
            time: "2026-11-23T10:00:00Z".to_owned(),
        });
    }
    let count = bytes.int_in_range(0..=4)?;
    let component = |bytes: &mut Unstructured| {
        Ok(match bytes.int_in_range(0..=3)? {
            0 => Component::Digest(bytes.arbitrary()?),
            1 => Component::Int(bytes.arbitrary()?),
            2 => Component::Float(bytes.arbitrary()?),
            _ => Component::Text(bytes.arbitrary()?),
        })
    };
    Ok(Record::Boundary {
        step: any_size(bytes)?,
        phase: bytes.int_in_range(0..=3)?,
        epoch: any_size(bytes)?,
        position: any_size(bytes)?,
        components: (0..count)
            .map(|_| Ok((bytes.arbitrary()?, component(bytes)?)))
            .collect::<Result<_>>()?,
    })
}

/// Every record that is read is exactly its bytes; a segment that was written is read to its end.
pub fn journals(bytes: &[u8]) {
    let read = |segment: &[u8]| {
        let Ok(mut reader) = SegmentReader::new(segment) else {
            return 0;
        };
        let mut count = 0;
        let mut previous = reader.head();
        for entry in reader.by_ref().map(|entry| entry.expect("memory can be read")) {
            let (written, chain) =
                journal::encode_record(&previous, &entry.record).expect("what was read can be written");
            let at = entry.offset as usize;
            assert_eq!(&segment[at..at + written.len()], written);
            assert_eq!(entry.chain, chain);
            previous = chain;
            count += 1;
        }
        assert!(reader.offset() <= segment.len() as u64);
        reader.ending().expect("memory can be read");
        count
    };
    read(bytes);
    let (start, chain) = segment_start();
    read(&[start.as_slice(), bytes].concat());
    if !bytes.is_empty() {
        read(&[start.as_slice(), &seal_record(&chain, bytes).0].concat());
    }
    let mut bytes = Unstructured::new(bytes);
    let (mut segment, mut chain, mut count) = (start, chain, 0);
    while let (false, Ok(record)) = (bytes.is_empty(), any_record(&mut bytes)) {
        if let Ok((written, next)) = journal::encode_record(&chain, &record) {
            segment.extend(written);
            (chain, count) = (next, count + 1);
        }
    }
    assert_eq!(read(&segment), count);
}

/// A certificate that is read is the one that is written again.
pub fn certificates(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    if let Ok(found) = Certificate::parse(text, Path::new("certificate")) {
        let again = Certificate::parse(&found.to_text(), Path::new("certificate"));
        assert_eq!(again.expect("what was written can be read"), found);
    }
}

/// A run directory with files from a stranger opens, or says what is wrong with it; nothing in it is taken for what it is
/// not. `bytes` are the files: each a sort, a length and that many bytes.
pub fn directories(bytes: &[u8]) {
    let storage = MemoryStorage::new();
    for name in ["checkpoints", "objects", "journal", "tmp"] {
        storage.create_dir(name).expect("a directory is made in memory");
    }
    let config = "# Who this run is. Written once by unbroken; do not edit.\ncreated = \"2026-11-23T10:00:00Z\"\n\
                  format = 1\nid = \"stranger\"\nseed = \"7\"\n\n[settings]\n";
    storage.put("run.toml", config.as_bytes().to_vec());
    let mut bytes = Unstructured::new(bytes);
    let mut number = 0;
    while !bytes.is_empty() {
        if put_any(&storage, &mut bytes, number).is_err() {
            break;
        }
        number += 1;
    }
    let options = Options::default();
    let Ok(run) = Run::open_on(Arc::new(storage.clone()), &options) else {
        return;
    };
    for info in run.checkpoints() {
        let Ok(checkpoint) = run.checkpoint(&info.name) else {
            continue;
        };
        for (index, (length, digest)) in checkpoint.storages().into_iter().enumerate() {
            if let Ok(found) = checkpoint.read(index) {
                assert_eq!((found.len() as u64, Digest::of(&found)), (length, digest));
            }
        }
    }
    drop(run.begin());
}

fn put_any(storage: &MemoryStorage, bytes: &mut Unstructured, number: u32) -> Result<()> {
    let sort = bytes.int_in_range(0..=7)?;
    let length = bytes.int_in_range(0..=300)?.min(bytes.len());
    match sort {
        0 => storage.put("run.toml", bytes.bytes(length)?.to_vec()),
        1 => {
            let sealed = seal_manifest(bytes.int_in_range(1..=3)?, bytes.bytes(length)?);
            put_manifest(storage, sealed, number);
        }
        2 => {
            if let Ok((sealed, _)) = manifest::encode(&any_manifest(bytes)?) {
                put_manifest(storage, sealed, number);
            }
        }
        3 => storage.put(
            &format!("objects/{:032x}.safetensors", number % 4),
            bytes.bytes(length)?.to_vec(),
        ),
        4 => {
            let (start, chain) = segment_start();
            let mut segment = start;
            if let Ok((record, _)) = journal::encode_record(&chain, &any_record(bytes)?) {
                segment.extend(record);
            }
            segment.extend(bytes.bytes(length.min(bytes.len()))?);
            storage.put("journal/000001.journal", segment);
        }
        5 => storage.put("journal/000002.journal", bytes.bytes(length)?.to_vec()),
        6 => put_whole(storage, bytes, number)?,
        _ => {
            let name: String = bytes.arbitrary()?;
            let plain = !name.is_empty() && !name.contains(['/', '\0']) && name != "." && name != "..";
            if plain {
                let dir = bytes.choose(&["checkpoints", "objects", "journal", "tmp"])?;
                storage.put(
                    &format!("{dir}/{name}"),
                    bytes.bytes(length.min(bytes.len()))?.to_vec(),
                );
            }
        }
    }
    Ok(())
}

fn put_manifest(storage: &MemoryStorage, sealed: Vec<u8>, number: u32) {
    let digest = Digest(
        *sealed
            .last_chunk()
            .expect("a sealed manifest ends with its digest"),
    );
    let (step, phase) = match manifest::decode(&sealed) {
        Ok((found, _)) => (found.step, found.phase),
        Err(_) => (u64::from(number), 0),
    };
    let name = manifest::checkpoint_name(step, phase, &digest);
    storage.put(&format!("checkpoints/{name}"), sealed);
}

/// The frame of a block, or almost so.
fn any_frame(bytes: &mut Unstructured, block: Vec<u8>) -> Result<Vec<u8>> {
    let width = *bytes.choose(&WIDTHS)? as usize;
    let mut frame = Coder::default().encode(&block, width, Planes::ALL).to_vec();
    if !frame.is_empty() && bytes.ratio(1, 2)? {
        let at = bytes.int_in_range(0..=frame.len() - 1)?;
        frame[at] = bytes.arbitrary()?;
    }
    Ok(frame)
}

/// A checkpoint with a pack that fits it, so that it is taken; what its tree says of the storage is the stranger's.
fn put_whole(storage: &MemoryStorage, bytes: &mut Unstructured, number: u32) -> Result<()> {
    let (in_pieces, is_coded) = (bytes.ratio(1, 3)?, bytes.ratio(1, 3)?);
    let mut content: Vec<u8> = bytes.arbitrary()?;
    if in_pieces {
        content.resize(3 * CHUNK as usize - 7, 1);
    }
    let block = content.clone();
    if is_coded && !in_pieces {
        content = any_frame(bytes, content)?;
    }
    let tensor = pack::describe("weight".to_owned(), content.len() as u64, None);
    let layout = pack::plan(&[tensor]).expect("one plain tensor can be laid out");
    let name = format!("{:032x}.safetensors", 16 + number);
    let offset = layout.offsets[0];
    let mut entry = StorageEntry {
        digest: Digest::of(&content),
        length: content.len() as u64,
        place: Place::Whole { pack: 0, offset },
    };
    if in_pieces {
        // The storage's second and first chunk, in the pack the other way round, and the rest, or almost so.
        let assembly = Assembly::of_groups(entry.length, CHUNK as usize);
        let mut storage = content.clone();
        let (first, second) = storage[..2 * CHUNK as usize].split_at_mut(CHUNK as usize);
        first.swap_with_slice(second);
        assembly.put(0, &storage);
        let last = entry.length - 2 * CHUNK;
        let piece = |at: u64, length| Piece {
            source: 0,
            offset: offset + at * CHUNK,
            length,
        };
        let mut pieces = vec![piece(1, CHUNK), piece(0, CHUNK), piece(2, last)];
        match bytes.int_in_range(0..=5)? {
            0 => pieces[1].offset = any_size(bytes)?,
            1 => pieces[2].length = any_size(bytes)?,
            2 => pieces[0].offset = pieces[1].offset,
            _ => {}
        }
        let check = assembly.digest_of_values(std::iter::once(0..3));
        entry.digest = if bytes.ratio(1, 8)? {
            check
        } else {
            assembly.finish()
        };
        entry.place = Place::Pieces(Pieces {
            chunk: CHUNK,
            sources: vec![Source { pack: 0, check }],
            pieces,
        });
    }
    if is_coded && !in_pieces {
        entry.digest = Digest::of(&block);
        entry.length = match bytes.int_in_range(0..=5)? {
            0 => any_size(bytes)?,
            1 => BLOCK as u64,
            _ => block.len() as u64,
        };
        entry.place = Place::Coded(Coded {
            width: *bytes.choose(&WIDTHS)?,
            layers: vec![Layer {
                pack: 0,
                check: Digest::of(&Digest::of(&content).0),
                offset,
                frames: vec![content.len() as u64],
            }],
        });
    }
    let any = Manifest {
        packs: vec![PackEntry {
            name: name.clone(),
            length: layout.length,
            header_digest: layout.header_digest,
        }],
        storages: vec![entry],
        ..any_manifest(bytes)?
    };
    if let Ok((sealed, _)) = manifest::encode(&any) {
        storage.put(&format!("objects/{name}"), [layout.header, content].concat());
        put_manifest(storage, sealed, number);
    }
    Ok(())
}
