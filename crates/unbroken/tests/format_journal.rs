//! Journal segments, through the public API only.

use proptest::prelude::*;
use unbroken::Digest;
use unbroken::format::Flaw;
use unbroken::format::journal::{
    Component, Ending, Entry, MAX_RECORD, Record, SegmentHeader, SegmentReader, encode_header, encode_record,
};
use unbroken::state::Value;

fn header() -> SegmentHeader {
    SegmentHeader {
        run_id: "0f3c9a2e77d14b60".into(),
        life: 2,
        step: 1200,
        phase: 0,
        previous: Digest::of(b"before"),
        created: "2026-11-23T10:00:00Z".into(),
    }
}

fn boundary(step: u64) -> Record {
    Record::Boundary {
        step,
        phase: 0,
        epoch: 3,
        position: step % 40,
        components: vec![
            ("data".into(), Component::Digest(vec![step as u8; 16])),
            ("count".into(), Component::Int(-1)),
            ("loss".into(), Component::Float(f64::NAN.to_bits())),
            ("note".into(), Component::Text("é".into())),
        ],
    }
}

fn event() -> Record {
    let fields = vec![
        ("name".into(), Value::Str("SIGTERM".into())),
        ("who".into(), Value::Tuple(vec![Value::None])),
    ];
    Record::Event {
        kind: "signal".into(),
        step: 1202,
        fields,
        time: "2026-11-23T10:00:01.5Z".into(),
    }
}

fn records() -> Vec<Record> {
    vec![boundary(1201), boundary(1202), event(), boundary(1203)]
}

/// A segment, and where its header and each record end.
fn segment(records: &[Record]) -> (Vec<u8>, Vec<usize>) {
    let (mut bytes, mut chain) = encode_header(&header()).unwrap();
    let mut ends = vec![bytes.len()];
    for record in records {
        let (next, after) = encode_record(&chain, record).unwrap();
        bytes.extend(next);
        ends.push(bytes.len());
        chain = after;
    }
    (bytes, ends)
}

fn read(bytes: &[u8]) -> Result<(Vec<Entry>, Ending), Flaw> {
    let mut reader = SegmentReader::new(bytes)?;
    let entries = reader.by_ref().collect::<Result<_, _>>()?;
    Ok((entries, reader.ending()?))
}

#[test]
fn reading_back_what_was_written_gives_the_same_records() {
    let (bytes, ends) = segment(&records());
    let reader = SegmentReader::new(bytes.as_slice()).unwrap();
    assert_eq!(reader.header(), Some(&header()));
    let entries: Vec<Entry> = reader.clone().collect::<Result<_, _>>().unwrap();
    assert_eq!(
        entries
            .iter()
            .map(|entry| entry.record.clone())
            .collect::<Vec<_>>(),
        records()
    );
    let offsets: Vec<u64> = ends[..4].iter().map(|end| *end as u64).collect();
    assert_eq!(
        entries.iter().map(|entry| entry.offset).collect::<Vec<_>>(),
        offsets
    );
    assert_eq!(entries[3].chain.0, bytes[bytes.len() - 32..]);
    assert_eq!(reader.ending().unwrap(), Ending::Complete);
}

#[test]
fn every_prefix_of_a_journal_opens() {
    let (bytes, ends) = segment(&records());
    for length in 0..=bytes.len() {
        let (entries, ending) = read(&bytes[..length]).unwrap();
        let whole = ends.iter().filter(|end| **end <= length).count();
        let offset = if whole == 0 { 0 } else { ends[whole - 1] };
        assert_eq!(entries.len(), whole.saturating_sub(1), "length {length}");
        let complete = length == offset && whole > 0;
        let expected = if complete {
            Ending::Complete
        } else {
            Ending::Torn {
                offset: offset as u64,
            }
        };
        assert_eq!(ending, expected, "length {length}");
    }
}

#[test]
fn every_flipped_bit_of_a_journal_is_noticed() {
    let (bytes, ends) = segment(&records());
    for bit in 0..bytes.len() * 8 {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let hit = ends.iter().filter(|end| **end <= bit / 8).count(); // 0: the header, then the records from 1.
        match read(&flipped) {
            Err(_) => assert_eq!(hit, 0, "bit {bit}"),
            Ok((entries, Ending::Damaged { record, offset, .. })) => {
                assert!((1..4).contains(&hit), "bit {bit}");
                assert_eq!(
                    (record as usize, offset as usize),
                    (hit - 1, ends[hit - 1]),
                    "bit {bit}"
                );
                assert_eq!(entries.len(), hit - 1);
            }
            // The last record, and only the last, may pass for one that was never finished.
            Ok((entries, ending)) => {
                assert_eq!((hit, entries.len()), (4, 3), "bit {bit}");
                assert_eq!(
                    ending,
                    Ending::Torn {
                        offset: ends[3] as u64
                    }
                );
            }
        }
    }
}

#[test]
fn a_tail_that_a_power_cut_left_zero_or_garbled_is_torn() {
    let (bytes, ends) = segment(&records());
    for kept in [ends[0], ends[2], ends[3]] {
        for tail in [
            vec![0; 4096],
            vec![0xff; 4096],
            b"GARBAGE ".repeat(100),
            vec![3, 0, 0, 0, 0x85],
        ] {
            let garbled = [&bytes[..kept], &tail].concat();
            assert_eq!(read(&garbled).unwrap().1, Ending::Torn { offset: kept as u64 });
        }
    }
    assert_eq!(read(&[0; 300]).unwrap().1, Ending::Torn { offset: 0 });
    let mut headless = bytes[..ends[0]].to_vec();
    headless[8..].fill(0);
    assert_eq!(read(&headless).unwrap().1, Ending::Torn { offset: 0 });
}

#[test]
fn damage_in_the_middle_names_the_step_before_it() {
    let (mut bytes, ends) = segment(&records());
    bytes[ends[2] + 10] ^= 0x20;
    match read(&bytes).unwrap().1 {
        Ending::Damaged {
            after_step,
            record,
            offset,
            ..
        } => {
            assert_eq!((after_step, record, offset), (1202, 2, ends[2] as u64));
        }
        ending => panic!("{ending:?}"),
    }
}

#[test]
fn a_whole_record_of_an_unknown_sort_is_not_taken_for_a_torn_one() {
    let (mut bytes, mut chain) = encode_header(&header()).unwrap();
    let kept = bytes.len() as u64;
    let payload = unbroken::format::value::encode(&Value::List(vec![Value::Str("later".into())])).unwrap();
    chain = unbroken::digest::Hasher::new()
        .update(&chain.0)
        .update(&payload)
        .finish();
    bytes.extend((payload.len() as u32).to_le_bytes());
    bytes.extend(&payload);
    bytes.extend(chain.0);
    assert!(matches!(read(&bytes).unwrap().1, Ending::Damaged { offset, .. } if offset == kept));
}

#[test]
fn segments_of_another_sort_or_version_are_refused() {
    let (mut bytes, _) = segment(&records());
    bytes[8] = 2;
    assert_eq!(
        read(&bytes).unwrap_err(),
        Flaw::Version {
            what: "a journal segment",
            found: 2,
            newest: 1,
        }
    );
    assert_eq!(
        read(b"{\"step\": 1}").unwrap_err(),
        Flaw::NotOurs {
            what: "a journal segment"
        }
    );
}

#[test]
fn a_header_that_does_not_hold_is_torn_only_where_no_record_follows() {
    let (mut bytes, ends) = segment(&records());
    bytes[20] ^= 1;
    assert!(matches!(read(&bytes), Err(Flaw::Damaged { .. })));
    assert_eq!(read(&bytes[..ends[0]]).unwrap().1, Ending::Torn { offset: 0 });
}

#[test]
fn records_beyond_a_limit_are_not_written() {
    let chain = Digest::of(b"");
    let with = |component: Component| {
        let components = vec![("c".to_owned(), component)];
        encode_record(
            &chain,
            &Record::Boundary {
                step: 1,
                phase: 0,
                epoch: 0,
                position: 0,
                components,
            },
        )
    };
    assert!(with(Component::Digest(vec![0; 64])).is_ok());
    assert!(matches!(
        with(Component::Digest(vec![0; 65])),
        Err(Flaw::Limit { .. })
    ));
    assert!(matches!(
        with(Component::Text("x".repeat(MAX_RECORD))),
        Err(Flaw::Limit { .. })
    ));
    let twice = vec![
        ("c".to_owned(), Component::Int(1)),
        ("c".to_owned(), Component::Int(2)),
    ];
    let record = Record::Boundary {
        step: 1,
        phase: 0,
        epoch: 0,
        position: 0,
        components: twice,
    };
    assert!(encode_record(&chain, &record).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn arbitrary_bytes_behind_a_header_never_panic(tail in prop::collection::vec(any::<u8>(), 0..300)) {
        let (header, _) = encode_header(&header()).unwrap();
        let (entries, _) = read(&[header.clone(), tail.clone()].concat()).unwrap();
        prop_assert_eq!(entries, vec![]);
        let _ = read(&tail);
        let _ = read(&[&header[..16], &tail].concat());
    }
}
