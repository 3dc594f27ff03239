//! Manifests and checkpoint names, through the public API only.

use proptest::prelude::*;
use unbroken::Digest;
use unbroken::format::Flaw;
use unbroken::format::manifest::{
    Coded, Draft, Layer, MAX_FRAMES, MAX_PIECES, Manifest, PackEntry, Piece, Pieces, Place, Source,
    StorageEntry, checkpoint_name, decode, encode, parse_checkpoint_name,
};
use unbroken::state::{Tensor, Value};

fn tensor(dtype: &str, shape: &[u64], strides: &[i64], offset: u64, storage: u32) -> Value {
    let (shape, strides) = (shape.to_vec(), strides.to_vec());
    Value::from(Tensor {
        dtype: dtype.into(),
        shape,
        strides,
        offset,
        storage,
        device: "cpu".into(),
        attrs: vec![],
    })
}

/// A checkpoint of two tied weights, a bare number and two storages of 24 and 3 bytes in one pack.
fn manifest() -> Manifest {
    let weight = tensor("float32", &[2, 3], &[3, 1], 0, 0);
    Manifest {
        run_id: "0f3c9a2e77d14b60".into(),
        step: 1200,
        phase: 0,
        parent: Some("000001100-0-0123456789abcdef".into()),
        life: 2,
        created: "2026-11-23T10:00:00Z".into(),
        tree: Value::dict(vec![
            (Value::Str("weight".into()), weight.clone()),
            (Value::Str("tied".into()), weight),
            (Value::Str("mask".into()), tensor("bool", &[3], &[1], 0, 1)),
            (Value::Str("best".into()), Value::Float(0.25f64.to_bits())),
        ]),
        storages: vec![
            StorageEntry {
                digest: Digest::of(&[0; 24]),
                length: 24,
                place: Place::Whole { pack: 0, offset: 192 },
            },
            StorageEntry {
                digest: Digest::of(&[1; 3]),
                length: 3,
                place: Place::Whole { pack: 0, offset: 216 },
            },
        ],
        packs: vec![PackEntry {
            name: "00112233445566778899aabbccddeeff.safetensors".into(),
            length: 219,
            header_digest: Digest::of(b"header"),
        }],
        identity: vec![("seed".into(), Value::Int(1))],
        environment: vec![("torch".into(), Value::Str("2.15.0".into()))],
        metrics: vec![
            ("loss".into(), 0.5f64.to_bits()),
            ("nan".into(), f64::NAN.to_bits()),
        ],
        pinned: false,
        journal_head: Digest::of(b"journal"),
        new_bytes: 219,
    }
}

fn refused(change: impl FnOnce(&mut Manifest)) -> String {
    let mut manifest = manifest();
    change(&mut manifest);
    encode(&manifest)
        .expect_err("a manifest that breaks a rule was written")
        .to_string()
}

#[test]
fn reading_back_what_was_written_gives_the_same_manifest() {
    let (bytes, digest) = encode(&manifest()).unwrap();
    assert_eq!(decode(&bytes).unwrap(), (manifest(), digest));
    assert_eq!(bytes[bytes.len() - 32..], digest.0);
    assert_eq!(Digest::of(&bytes[..bytes.len() - 32]), digest);
}

#[test]
fn a_draft_takes_the_digests_of_its_storages_later() {
    for whole in [manifest(), with_pieces().0, with_layers().0] {
        let mut unwritten = whole.clone();
        for storage in &mut unwritten.storages {
            storage.digest = Digest([0; 32]);
        }
        let draft = Draft::of(&unwritten).unwrap();
        let length = draft.length();
        let (bytes, digest) = draft.finish(&whole.storages);
        assert_eq!(bytes.len() as u64, length);
        assert_eq!((bytes.clone(), digest), encode(&whole).unwrap());
        assert_eq!(decode(&bytes).unwrap(), (whole, digest));
    }
}

#[test]
fn every_flipped_bit_of_a_manifest_is_noticed() {
    let bytes = [manifest(), with_pieces().0, with_layers().0].map(|manifest| encode(&manifest).unwrap().0);
    for (bytes, bit) in bytes
        .iter()
        .flat_map(|bytes| (0..bytes.len() * 8).map(move |bit| (bytes, bit)))
    {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&flipped).is_err(), "bit {bit}");
    }
}

#[test]
fn every_prefix_of_a_manifest_is_damaged() {
    let (bytes, _) = encode(&manifest()).unwrap();
    for length in 0..bytes.len() {
        assert!(
            matches!(decode(&bytes[..length]), Err(Flaw::Damaged { .. })),
            "length {length}"
        );
    }
    assert!(matches!(
        decode(&[bytes, vec![0]].concat()),
        Err(Flaw::Damaged { .. })
    ));
}

#[test]
fn another_version_is_named_before_anything_else_is_read() {
    let (mut bytes, _) = encode(&manifest()).unwrap();
    bytes[8] = 9;
    assert_eq!(
        decode(&bytes),
        Err(Flaw::Version {
            what: "a manifest",
            found: 9,
            newest: 3
        })
    );
    assert!(matches!(
        decode(b"PK\x03\x04 something else"),
        Err(Flaw::NotOurs { .. })
    ));
}

#[test]
fn indices_and_views_that_leave_their_bounds_are_refused() {
    assert!(refused(|m| m.tree = tensor("float32", &[2, 3], &[3, 1], 0, 2)).contains("storage 2 of 2"));
    for (dtype, shape, strides, offset) in [
        ("float32", &[2, 3][..], &[3, 1][..], 1),
        ("float32", &[3, 3], &[3, 1], 0),
        ("float64", &[2, 3], &[3, 1], 0),
        ("float32", &[2], &[-1], 0),
        ("float32", &[u64::MAX, u64::MAX], &[i64::MAX, i64::MAX], u64::MAX),
        ("uint8", &[2, 2], &[i64::MIN, 1], 5),
    ] {
        assert!(
            refused(|m| m.tree = tensor(dtype, shape, strides, offset, 0)).contains("leaves its storage")
        );
    }
    assert!(
        refused(|m| m.storages[1].place = Place::Whole { pack: 1, offset: 216 }).contains("in pack 1 of 1")
    );
    assert!(
        refused(|m| m.storages[1].place = Place::Whole { pack: 0, offset: 217 }).contains("which has 219")
    );
    assert!(refused(|m| m.storages[1].length = u64::MAX).contains("which has 219"));
    assert!(refused(|m| m.identity[0].1 = tensor("uint8", &[1], &[1], 0, 0)).contains("storage 0 of 0"));
}

/// The same with a third storage of 20,000 bytes: four chunks of 4096 and one of 3616, in two packs.
fn with_pieces() -> (Manifest, Pieces) {
    let mut manifest = manifest();
    let piece = |source, offset, length| Piece {
        source,
        offset,
        length,
    };
    let source = |pack| Source {
        pack,
        check: Digest::of(&[pack as u8]),
    };
    let pieces = Pieces {
        chunk: 4096,
        sources: vec![source(1), source(0)],
        pieces: vec![
            piece(0, 64, 4096),
            piece(1, 8192, 8192),
            piece(0, 8256, 4096),
            piece(0, 4160, 3616),
        ],
    };
    let mut other = manifest.packs[0].clone();
    other.name = "ffffffffffffffffffffffffffffffff.safetensors".into();
    other.length = 64 + 3 * 4096;
    manifest.packs[0].length = 16384;
    manifest.packs.push(other);
    manifest.storages.push(StorageEntry {
        digest: Digest::of(b"pieces"),
        length: 20_000,
        place: Place::Pieces(pieces.clone()),
    });
    (manifest, pieces)
}

#[test]
fn a_storage_in_pieces_makes_a_manifest_of_version_2_and_reads_back() {
    let (manifest, _) = with_pieces();
    let (bytes, _) = encode(&manifest).unwrap();
    assert_eq!(bytes[8..12], 2u32.to_le_bytes());
    assert_eq!(decode(&bytes).unwrap().0, manifest);
    // Sealed again under the other version, either is refused: one manifest has one form.
    for (manifest, version) in [(manifest, 1u32), (self::manifest(), 2)] {
        let (mut bytes, _) = encode(&manifest).unwrap();
        bytes.truncate(bytes.len() - 32);
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        let digest = Digest::of(&bytes);
        bytes.extend(digest.0);
        let error = decode(&bytes).unwrap_err().to_string();
        assert!(error.contains(&format!("of version {version}")), "{error}");
    }
}

#[test]
fn pieces_that_do_not_make_up_their_storage_are_refused() {
    let refused = |change: &dyn Fn(&mut Pieces)| {
        let (mut manifest, mut pieces) = with_pieces();
        change(&mut pieces);
        manifest.storages[2].place = Place::Pieces(pieces);
        encode(&manifest)
            .expect_err("pieces that break a rule were written")
            .to_string()
    };
    for chunk in [0, 1, 2048, 4097, 12_288, 1 << 17, u64::MAX] {
        assert!(refused(&|found| found.chunk = chunk).contains("chunks of"));
    }
    // Too few, of lengths that are no chunks, or that do not add up, also where the sum overflows.
    assert!(refused(&|found| found.pieces.truncate(1)).contains("1 of them"));
    assert!(refused(&|found| found.pieces.clear()).contains("0 of them"));
    for length in [0, 4095, u64::MAX] {
        assert!(refused(&|found| found.pieces[0].length = length).contains("piece 0 has"));
    }
    assert!(refused(&|found| found.pieces[3].length = 0).contains("piece 3 has"));
    assert!(refused(&|found| found.pieces[0].length = 8192).contains("bytes of 20000"));
    assert!(refused(&|found| found.pieces[3].length = u64::MAX).contains("bytes of 20000"));
    // Outside of their packs, also where the end overflows.
    assert!(refused(&|found| found.pieces[1].offset = 8193).contains("which has 16384"));
    assert!(refused(&|found| found.pieces[1].offset = u64::MAX).contains("which has 16384"));
    assert!(refused(&|found| found.sources[0].pack = 2).contains("in pack 2 of 2"));
    // One byte of a pack twice, one piece as two, and sources that are none.
    assert!(refused(&|found| found.pieces[3].offset = 64 + 4095).contains("overlap"));
    assert!(refused(&|found| found.pieces[2].offset = 65).contains("overlap"));
    assert!(refused(&|found| found.pieces[3].offset = 8256 + 4096).contains("are one"));
    assert!(refused(&|found| found.pieces[1].source = 2).contains("in source 2"));
    assert!(refused(&|found| found.pieces[0].source = 1).contains("in source 1"));
    assert!(refused(&|found| found.sources[1].pack = 1).contains("one pack"));
    assert!(refused(&|found| found.sources.push(found.sources[0].clone())).contains("2 of 3 sources"));
}

#[test]
fn more_pieces_than_a_manifest_may_have_are_refused() {
    let (mut manifest, mut pieces) = with_pieces();
    let count = MAX_PIECES as u64 + 1;
    manifest.packs[0].length = 8192 * count;
    pieces.sources.truncate(1);
    pieces.sources[0].pack = 0;
    pieces.pieces = (0..count)
        .map(|index| Piece {
            source: 0,
            offset: index * 8192,
            length: 4096,
        })
        .collect();
    manifest.storages[2].length = count * 4096;
    manifest.storages[2].place = Place::Pieces(pieces.clone());
    assert!(matches!(encode(&manifest), Err(Flaw::Limit { .. })));
    pieces.pieces.pop();
    manifest.storages[2].length -= 4096;
    manifest.storages[2].place = Place::Pieces(pieces);
    let (bytes, _) = encode(&manifest).unwrap();
    assert_eq!(decode(&bytes).unwrap().0, manifest);
}

/// The same with a third storage of two blocks and a bit: numbers in one pack, and differences to them in another.
fn with_layers() -> (Manifest, Coded) {
    let (mut manifest, _) = with_pieces();
    let layer = |pack: u32, offset, frames: &[u64]| Layer {
        pack,
        check: Digest::of(&[pack as u8]),
        offset,
        frames: frames.to_vec(),
    };
    let coded = Coded {
        width: 4,
        layers: vec![layer(1, 64, &[5000, 1 << 20, 7]), layer(0, 128, &[300, 200, 100])],
    };
    manifest.packs[1].length = (1 << 20) + 64 + 5007;
    manifest.storages[2] = StorageEntry {
        digest: Digest::of(b"coded"),
        length: (2 << 20) + 100,
        place: Place::Coded(coded.clone()),
    };
    (manifest, coded)
}

#[test]
fn a_coded_storage_makes_a_manifest_of_version_3_and_reads_back() {
    let (mut manifest, coded) = with_layers();
    let (bytes, _) = encode(&manifest).unwrap();
    assert_eq!(bytes[8..12], 3u32.to_le_bytes());
    assert_eq!(decode(&bytes).unwrap().0, manifest);
    assert_eq!(
        manifest.storages[2].place.pieces(manifest.storages[2].length),
        [(1, 64, (1 << 20) + 5007), (0, 128, 600)]
    );
    // Beside one in pieces, too.
    let pieces = with_pieces().0.storages.pop().unwrap();
    manifest.storages.push(pieces);
    let (bytes, _) = encode(&manifest).unwrap();
    assert_eq!(bytes[8..12], 3u32.to_le_bytes());
    let place = decode(&bytes).unwrap().0.storages[2].place.clone();
    assert_eq!(place, Place::Coded(coded));
}

#[test]
fn layers_that_have_no_frame_for_each_block_or_leave_their_pack_are_refused() {
    let refused = |change: &dyn Fn(&mut Coded)| {
        let (mut manifest, mut coded) = with_layers();
        change(&mut coded);
        manifest.storages[2].place = Place::Coded(coded);
        encode(&manifest)
            .expect_err("layers that break a rule were written")
            .to_string()
    };
    for width in [0, 3, 16, u64::MAX] {
        assert!(refused(&|found| found.width = width).contains("numbers of"));
    }
    assert!(refused(&|found| found.layers.clear()).contains("in 0 layers"));
    assert!(refused(&|found| found.layers.push(found.layers[0].clone())).contains("in 3 layers"));
    assert!(refused(&|found| found.layers[1].pack = 1).contains("in one pack"));
    assert!(refused(&|found| found.layers[0].frames.truncate(2)).contains("2 frames of"));
    assert!(refused(&|found| found.layers[1].frames.push(1)).contains("4 frames of"));
    // Empty, longer than its block, and longer than the short last block.
    assert!(refused(&|found| found.layers[0].frames[0] = 0).contains("a frame of 0 bytes"));
    for length in [(1 << 20) + 1, u64::MAX >> 1] {
        assert!(refused(&|found| found.layers[0].frames[0] = length).contains("of a block of 1048576"));
    }
    assert!(refused(&|found| found.layers[1].frames[2] = 101).contains("of a block of 100"));
    // Outside of their packs, also where the end overflows.
    assert!(refused(&|found| found.layers[0].offset = 65).contains("which has"));
    assert!(refused(&|found| found.layers[1].offset = u64::MAX).contains("which has 16384"));
    assert!(refused(&|found| found.layers[1].pack = 2).contains("in pack 2 of 2"));
    let (mut manifest, _) = with_layers();
    manifest.storages[2].length = 0;
    assert!(encode(&manifest).unwrap_err().to_string().contains("0 bytes in"));
}

#[test]
fn more_frames_than_a_manifest_may_have_are_refused() {
    let (mut manifest, mut coded) = with_layers();
    coded.layers.truncate(1);
    coded.layers[0].frames = vec![1; MAX_FRAMES + 1];
    manifest.storages[2].length = (MAX_FRAMES as u64 + 1) << 20;
    manifest.storages[2].place = Place::Coded(coded.clone());
    assert!(matches!(encode(&manifest), Err(Flaw::Limit { .. })));
    coded.layers[0].frames.pop();
    manifest.storages[2].length = (MAX_FRAMES as u64) << 20;
    manifest.storages[2].place = Place::Coded(coded);
    let (bytes, _) = encode(&manifest).unwrap();
    assert_eq!(decode(&bytes).unwrap().0, manifest);
}

#[test]
fn views_inside_their_storage_are_accepted_whatever_their_strides() {
    for (dtype, shape, strides, offset) in [
        ("float32", &[3, 2][..], &[1, 3][..], 0),
        ("float32", &[1000], &[0], 5),
        ("float32", &[6], &[-1], 5),
        ("float32", &[0, 9], &[9, 1], 900),
        ("float32", &[], &[], 5),
        ("quint4x2", &[48], &[1], 0),
    ] {
        let mut manifest = manifest();
        manifest.tree = tensor(dtype, shape, strides, offset, 0);
        let (bytes, _) = encode(&manifest).unwrap();
        assert_eq!(decode(&bytes).unwrap().0, manifest);
    }
}

#[test]
fn names_that_could_lead_out_of_a_directory_are_refused() {
    for name in [
        "",
        ".",
        "..",
        "../a.safetensors",
        "a/b",
        "a\\b",
        ".hidden",
        "a\0b",
        "c:d",
        &"a".repeat(200),
    ] {
        refused(|m| m.packs[0].name = name.into());
    }
    for parent in ["../1", "000001100-0-0123456789ABCDEF", ""] {
        refused(|m| m.parent = Some(parent.into()));
    }
    refused(|m| m.packs.push(m.packs[0].clone()));
    refused(|m| m.run_id = "a b".into());
}

#[test]
fn numbers_outside_their_range_are_refused() {
    refused(|m| m.step = 1 << 63);
    refused(|m| m.phase = 3);
    refused(|m| m.life = 0);
    refused(|m| m.created = "yesterday".into());
    refused(|m| m.metrics.push(m.metrics[0].clone()));
}

#[test]
fn a_checkpoint_name_sorts_by_step_and_can_be_read_back() {
    let digest = Digest::of(b"");
    assert_eq!(checkpoint_name(1200, 0, &digest), "000001200-0-af1349b9f5f9a1a6");
    assert!(checkpoint_name(1199, 1, &digest) < checkpoint_name(1200, 0, &digest));
    let long = checkpoint_name(12_345_678_901, 2, &digest);
    let parsed = parse_checkpoint_name(&long).unwrap();
    assert_eq!(
        (parsed.step, parsed.phase, &parsed.digest[..]),
        (12_345_678_901, 2, &digest.0[..8])
    );
    for name in [
        "1200-0-af1349b9f5f9a1a6",
        "0000001200-0-af1349b9f5f9a1a6",
        "+00001200-0-af1349b9f5f9a1a6",
        "000001200-3-af1349b9f5f9a1a6",
        "000001200-00-af1349b9f5f9a1a6",
        "000001200-0-AF1349b9f5f9a1a6",
        "000001200-0-af1349b9f5f9a1",
        "000001200-0-af1349b9f5f9a1a6-x",
        "99999999999999999999-0-af1349b9f5f9a1a6",
        "",
    ] {
        assert_eq!(parse_checkpoint_name(name), None, "{name}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn arbitrary_payloads_behind_a_valid_frame_never_panic(payload in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut bytes = encode(&manifest()).unwrap().0[..12].to_vec();
        bytes.extend((payload.len() as u64).to_le_bytes());
        bytes.extend(payload);
        let digest = Digest::of(&bytes);
        bytes.extend(digest.0);
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn any_step_phase_and_digest_make_a_name_that_reads_back(step in 0..=i64::MAX as u64, phase in 0u8..3, digest: [u8; 32]) {
        let parsed = parse_checkpoint_name(&checkpoint_name(step, phase, &Digest(digest))).unwrap();
        prop_assert_eq!((parsed.step, parsed.phase), (step, phase));
        prop_assert_eq!(&parsed.digest[..], &digest[..8]);
    }
}
