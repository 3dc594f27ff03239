//! The loader against what PyTorch's keyed mode came to with the same seed: order, keys of samples, journal.
//!
//! Touches: `fixtures/keyed`, read only; a temporary directory.

use std::path::Path;

use serde_json::Value as Json;
use unbroken::format::journal::Component;
use unbroken::run::read_journal;
use unbroken::train::{
    Failure, Loader, Policy, Sample, Source, StateReader, StateWriter, Stateful, Training,
};

/// Each sample is its own number and the part of its key that the Python front seeds PyTorch with.
struct Seen(u64);

impl Source for Seen {
    type Item = (u64, String);

    fn len(&self) -> u64 {
        self.0
    }

    fn at(&self, sample: &Sample) -> Result<(u64, String), Failure> {
        let seed = u64::from_le_bytes(sample.key()[24..].try_into()?);
        Ok((sample.index, seed.to_string()))
    }
}

struct Nothing;

impl Stateful for Nothing {
    fn state<'a>(&'a mut self, _out: &mut StateWriter<'a>) -> unbroken::Result<()> {
        Ok(())
    }

    fn restore(&mut self, _from: &mut StateReader<'_>) -> unbroken::Result<()> {
        Ok(())
    }
}

#[test]
fn the_same_seed_gives_the_order_and_the_keys_that_python_has() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keyed/keyed.json");
    let fixture: Json = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
    let number = |name: &str| fixture[name].as_u64().unwrap();
    for workers in [0, 1, 3] {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("run");
        let loader = Loader::new(Seen(number("samples")), number("batch"));
        let mut loader = loader.shuffled().workers(workers);
        let options = Training::at(&path).seed(number("seed")).epochs(2);
        let options = options.policy(Policy::every_steps(100)).leave_signals_alone();
        let mut training = options.start(&mut Nothing).unwrap();
        let mut found = Vec::new();
        while training.next_epoch(&mut Nothing).unwrap().is_some() {
            while let Some(mut step) = training.next_step(&mut loader).unwrap() {
                let (indices, seeds): (Vec<u64>, Vec<String>) = step.take().into_iter().unzip();
                found.push(serde_json::json!({"indices": indices, "seeds": seeds}));
                step.commit(&mut Nothing).unwrap();
            }
        }
        let boundaries = read_journal(&path).unwrap().boundaries;
        let steps = boundaries.iter().filter(|boundary| boundary.phase == 0);
        for (batch, step) in found.iter_mut().zip(steps) {
            let (name, Component::Digest(digest)) = &step.components[0] else {
                panic!("indices are recorded by their digest");
            };
            assert_eq!(name, "data/indices");
            let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
            batch["digest"] = digits.into();
        }
        assert_eq!(fixture["batches"], Json::Array(found), "{workers} workers");
    }
}
