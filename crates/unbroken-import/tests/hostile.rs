//! Files that are damaged or made up: each is read or refused, none runs on, takes the program down or lies.
//!
//! Touches: fixtures that torch wrote, read only.

use std::time::{Duration, Instant};

use proptest::prelude::*;
use unbroken::format::value;
use unbroken::state::Value;
use unbroken_import::{Legacy, read};

const ARCHIVE: &[u8] = include_bytes!("../../../fixtures/import/archive.pt");
const STREAM: &[u8] = include_bytes!("../../../fixtures/import/stream.pt");
const PROTOCOL_5: &[u8] = include_bytes!("../../../fixtures/import/protocol5.pt");
const ALL: [&[u8]; 3] = [ARCHIVE, STREAM, PROTOCOL_5];

/// Reads a file; what comes out must be something that a checkpoint can hold.
fn survives(file: &[u8]) -> Option<Legacy> {
    let legacy = read(file).ok()?;
    legacy.storages(file);
    value::encode(&legacy.tree).unwrap();
    Some(legacy)
}

#[test]
fn the_three_formats_hold_the_same() {
    let trees = ALL.map(|file| read(file).unwrap().tree);
    assert_eq!(trees[0], trees[1]);
    assert_eq!(trees[0], trees[2]);
    assert_eq!(trees[0].get("epoch"), Some(&Value::Int(3)));
    let Some(Value::Object(object)) = trees[0].get("net") else {
        panic!("{:?}", trees[0]);
    };
    assert_eq!(object.name, "collections.OrderedDict");
    let tensor = |name: &str| match object.fields[0].1.get(name) {
        Some(Value::Tensor(tensor)) => tensor.clone(),
        other => panic!("{other:?}"),
    };
    let (weight, tied) = (tensor("weight"), tensor("tied"));
    assert_eq!((&weight.shape, &weight.strides), (&vec![2, 3], &vec![3, 1]));
    assert_eq!((&tied.shape, &tied.strides), (&vec![3, 2], &vec![1, 3]));
    assert_eq!(weight.storage, tied.storage);
    let legacy = read(ARCHIVE).unwrap();
    let bytes: Vec<u8> = (0..6).flat_map(|number| (number as f32).to_le_bytes()).collect();
    assert_eq!(legacy.storages(ARCHIVE)[weight.storage as usize], bytes);
}

#[test]
fn a_changed_byte_of_an_archive_is_noticed_or_changes_nothing() {
    // A bit of the padding, of a time stamp, of a field that nobody reads may flip; none of the content.
    for whole_file in [ARCHIVE, PROTOCOL_5] {
        let whole = read(whole_file).unwrap();
        let mut noticed = 0;
        for place in 0..whole_file.len() {
            for change in [1 << (place % 8), 0xff] {
                let mut file = whole_file.to_vec();
                file[place] ^= change;
                match survives(&file) {
                    None => noticed += 1,
                    Some(found) => {
                        assert_eq!(found.tree, whole.tree, "byte {place}");
                        assert_eq!(found.storages(&file), whole.storages(whole_file), "byte {place}");
                    }
                }
            }
        }
        assert!(noticed > whole_file.len(), "{noticed}");
    }
}

#[test]
fn a_changed_byte_of_a_stream_is_read_or_refused() {
    // This format has no checksums: a changed number is another number.
    for place in 0..STREAM.len() {
        for change in [1 << (place % 8), 0xff] {
            let mut file = STREAM.to_vec();
            file[place] ^= change;
            survives(&file);
        }
    }
}

#[test]
fn every_prefix_is_refused() {
    for file in ALL {
        for length in 0..file.len() {
            assert!(survives(&file[..length]).is_none(), "{length} bytes");
        }
    }
}

/// Opcodes, arguments and names of a checkpoint, so that what is made up of them gets somewhere.
fn pieces() -> Vec<Vec<u8>> {
    let mut pieces: Vec<Vec<u8>> = b".N)]}(0123456789tlbdaeusRQ\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94"
        .iter()
        .map(|byte| vec![*byte])
        .collect();
    let names: [&[u8]; 12] = [
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_tensor_v3\n",
        b"ctorch._utils\n_rebuild_parameter\n",
        b"ctorch\nFloatStorage\n",
        b"ctorch\nSize\n",
        b"ctorch\nfloat32\n",
        b"ccollections\nOrderedDict\n",
        b"ccollections\ndefaultdict\n",
        b"cnumpy._core.multiarray\n_reconstruct\n",
        b"cnumpy\nndarray\n",
        b"cnumpy\ndtype\n",
        b"c_codecs\nencode\n",
    ];
    let arguments: [&[u8]; 10] = [
        b"K\x00",
        b"K\x02",
        b"J\xff\xff\xff\xff",
        b"\x8c\x07storage",
        b"\x8c\x010",
        b"\x8c\x03cpu",
        b"\x8c\x02f4",
        b"C\x08\0\0\0\0\0\0\0\0",
        b"q\x00",
        b"h\x00",
    ];
    pieces.extend(names.iter().chain(&arguments).map(|piece| piece.to_vec()));
    pieces
}

/// A stream whose object is this pickle.
fn stream_of(pickle: &[u8]) -> Vec<u8> {
    let object = STREAM
        .windows(2)
        .enumerate()
        .filter(|(_, pair)| *pair == b"\x80\x02");
    let starts: Vec<usize> = object.map(|(at, _)| at).collect();
    let mut file = STREAM[..starts[3]].to_vec(); // The magic number, the version, about the machine.
    file.extend_from_slice(pickle);
    file
}

#[test]
fn a_made_up_pickle_without_a_fault_is_read() {
    let legacy = survives(&stream_of(b"\x80\x02(K\x02]t.\x80\x02].")).unwrap();
    assert_eq!(
        legacy.tree,
        Value::Tuple(vec![Value::Int(2), Value::List(Vec::new())])
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn pickles_made_up_of_pieces_are_read_or_refused(
        chosen in prop::collection::vec(prop::sample::select(pieces()), 0..60)
    ) {
        let begun = Instant::now();
        let mut pickle = b"\x80\x02".to_vec();
        pickle.extend(chosen.concat());
        pickle.extend(b".\x80\x02].");
        survives(&stream_of(&pickle));
        prop_assert!(begun.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_file_with_some_bytes_exchanged_is_read_or_refused(
        which in 0..3usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8)
    ) {
        let mut file = ALL[which].to_vec();
        for (place, byte) in changes {
            let place = place.index(file.len());
            file[place] = byte;
        }
        survives(&file);
    }

    #[test]
    fn any_bytes_are_refused_or_read(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        survives(&bytes);
        let mut archive = b"PK\x03\x04".to_vec();
        archive.extend(&bytes);
        survives(&archive);
    }
}
