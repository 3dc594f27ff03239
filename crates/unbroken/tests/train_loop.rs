//! The loop through its public API: resuming, refusing, proving, ending.
//!
//! Touches: temporary directories. A life that is cut short is a `Training` dropped in the middle.

use std::path::Path;

use unbroken::train::{
    Failure, Level, Loader, Options, Policy, Sample, Source, StateReader, StateWriter, Stateful, Training,
};
use unbroken::{Error, Result, Value};

struct Numbers(u64);

impl Source for Numbers {
    type Item = f64;

    fn len(&self) -> u64 {
        self.0
    }

    fn at(&self, sample: &Sample) -> std::result::Result<f64, Failure> {
        Ok(sample.index as f64 + sample.draws().uniform())
    }
}

/// Weights, and a generator of the kind that can only be seeded: shared with whoever seeds it.
struct Model {
    weights: Vec<f32>,
    momentum: Vec<f32>,
    count: i64,
}

impl Model {
    fn new() -> Model {
        Model {
            weights: vec![0.5; 8],
            momentum: vec![0.0; 8],
            count: 0,
        }
    }

    fn train(&mut self, batch: &[f64], noise: f64) -> f64 {
        for (place, (weight, momentum)) in self.weights.iter_mut().zip(&mut self.momentum).enumerate() {
            let target = batch[place % batch.len()] as f32 + noise as f32;
            *momentum = 0.9 * *momentum + (*weight - target);
            *weight -= 0.01 * *momentum;
        }
        self.count += 1;
        self.weights.iter().map(|weight| f64::from(*weight)).sum()
    }
}

impl Stateful for Model {
    fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
        out.tensor("weights", &[8], &self.weights)?;
        let momentum = &self.momentum;
        out.costly("optimizer", || 32, |out| out.tensor("momentum", &[8], momentum))?;
        out.value("count", self.count)
    }

    fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
        from.tensor_into("weights", &[8], &mut self.weights)?;
        from.scope("optimizer", |from| {
            from.tensor_into("momentum", &[8], &mut self.momentum)
        })?;
        self.count = from.int("count")?;
        Ok(())
    }
}

/// The generator of a framework: one for the process, no way to read it.
#[derive(Clone, Default)]
struct Hidden(std::rc::Rc<std::cell::Cell<u64>>);

impl Hidden {
    fn draw(&self) -> f64 {
        self.0.set(
            self.0
                .get()
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407),
        );
        (self.0.get() >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn options(path: &Path, hidden: &Hidden) -> Options {
    let cell = hidden.clone();
    plain_options(path).generator("hidden", move |key: [u8; 32]| {
        cell.0.set(u64::from_le_bytes(key[..8].try_into().unwrap()));
        Ok(())
    })
}

fn plain_options(path: &Path) -> Options {
    Training::at(path)
        .seed(3)
        .epochs(3)
        .policy(Policy::every_steps(4).not_at_epoch_ends())
        .leave_signals_alone()
}

fn loader() -> Loader<Vec<f64>> {
    Loader::new(Numbers(20), 3).shuffled()
}

/// Trains until `until` steps are done, or to the end.
fn go(options: Options, hidden: &Hidden, mut loader: Loader<Vec<f64>>, until: u64) -> Result<Training> {
    let mut model = Model::new();
    let mut training = options.start(&mut model)?;
    while training.next_epoch(&mut model)?.is_some() {
        while let Some(mut step) = training.next_step(&mut loader)? {
            let batch = step.take();
            let loss = model.train(&batch, hidden.draw());
            step.log("loss", loss);
            step.commit(&mut model)?;
            if training.step() == until {
                return Ok(training);
            }
        }
        training.log("after", hidden.draw());
    }
    Ok(training)
}

fn records(path: &Path) -> Vec<unbroken::journal::Boundary> {
    let mut boundaries = unbroken::run::read_journal(path).unwrap().boundaries;
    boundaries.iter_mut().for_each(|boundary| boundary.lives.clear());
    boundaries
}

#[test]
fn a_life_cut_short_anywhere_changes_no_record() {
    let home = tempfile::tempdir().unwrap();
    let reference = home.path().join("reference");
    let hidden = Hidden::default();
    assert!(
        go(options(&reference, &hidden), &hidden, loader(), u64::MAX)
            .unwrap()
            .is_finished()
    );
    let expected = records(&reference);
    assert_eq!(expected.len(), 21 + 3);
    // Epochs have 7 steps, checkpoints come every 4: first and last steps, saved ones and those just after.
    for until in [1, 4, 6, 7, 8, 14, 20, 21] {
        let path = home.path().join(format!("cut-{until}"));
        for life in 0..2 {
            // Whatever the process drew before.
            let hidden = Hidden::default();
            hidden.0.set(until * 7 + life);
            let until = if life == 0 { until } else { u64::MAX };
            go(
                options(&path, &hidden),
                &hidden,
                loader().workers(life as usize * 2),
                until,
            )
            .unwrap();
        }
        assert_eq!(records(&path), expected, "cut after step {until}");
    }
}

/// The generator is not registered: after a resume it stands where a new process has it, and the first step that draws
/// from it shows it.
#[test]
fn a_generator_that_is_not_keyed_is_named_by_the_first_step_that_it_changes() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    go(plain_options(&path), &Hidden::default(), loader(), 6).unwrap();
    let Err(Error::Diverged { step, component, .. }) =
        go(plain_options(&path), &Hidden::default(), loader(), 9)
    else {
        panic!("the journal did not notice");
    };
    assert_eq!((step, component.as_str()), (5, "log/loss"));
}

/// State that `state` does not write is not put back: the sampled journal sees the weights go another way.
#[test]
fn state_that_is_forgotten_is_noticed_at_the_first_step() {
    struct Forgetful(Model);
    impl Stateful for Forgetful {
        fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
            out.tensor("weights", &[8], &self.0.weights)
        }
        fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
            from.tensor_into("weights", &[8], &mut self.0.weights)
        }
    }
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    let life = |until| -> Result<()> {
        let (mut model, mut loader) = (Forgetful(Model::new()), loader());
        let mut training = plain_options(&path).start(&mut model)?;
        while training.next_epoch(&mut model)?.is_some() {
            while let Some(mut step) = training.next_step(&mut loader)? {
                model.0.train(&step.take(), 0.0);
                step.commit(&mut model)?;
                if training.step() == until {
                    return Ok(());
                }
            }
        }
        Ok(())
    };
    life(7).unwrap();
    let error = life(7).unwrap_err();
    assert!(
        matches!(&error, Error::Diverged { step: 5, component, .. } if component == "state/weights"),
        "{error}"
    );
}

/// The order starts again at the epoch's first batch after a resume, as in loaders that keep their place in memory.
#[test]
fn an_order_that_starts_again_is_named_by_its_indices() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    let hidden = Hidden::default();
    go(options(&path, &hidden), &hidden, loader(), 6).unwrap();
    // Another length of batch would be refused; allowed, it serves other samples.
    let other = options(&path, &hidden).allow("loader.shuffled");
    let unshuffled = Loader::new(Numbers(20), 3);
    let Err(Error::Diverged { step, component, .. }) = go(other, &hidden, unshuffled, 9) else {
        panic!("the journal did not notice");
    };
    assert_eq!((step, component.as_str()), (5, "data/indices"));
}

#[test]
fn steps_done_again_are_counted_as_proven() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    let hidden = Hidden::default();
    go(options(&path, &hidden), &hidden, loader(), 7).unwrap();
    let training = go(options(&path, &hidden), &hidden, loader(), 12).unwrap();
    assert_eq!((training.life(), training.steps_proven()), (2, 3));
}

#[test]
fn a_changed_program_is_refused_by_name_and_goes_on_only_if_allowed() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    let hidden = Hidden::default();
    go(
        options(&path, &hidden).identity("width", 8i64),
        &hidden,
        loader(),
        6,
    )
    .unwrap();
    let refusal = |options: Options, loader| match go(options, &hidden, loader, 9) {
        Err(Error::Identity { differences, .. }) => differences,
        other => panic!("not refused: {:?}", other.err()),
    };
    let same = || options(&path, &hidden).identity("width", 8i64);
    assert_eq!(
        refusal(
            options(&path, &hidden).identity("width", 9i64).epochs(4),
            loader()
        ),
        [
            ("plan.epochs".to_owned(), "3".to_owned(), "4".to_owned()),
            ("user.width".to_owned(), "8".to_owned(), "9".to_owned())
        ]
    );
    assert_eq!(
        refusal(same(), Loader::new(Numbers(21), 3).shuffled()),
        [("loader.samples".to_owned(), "20".to_owned(), "21".to_owned())]
    );
    let longer = same().epochs(4).allow("plan.epochs");
    assert_eq!(go(longer, &hidden, loader(), u64::MAX).unwrap().step(), 28);
    let events = unbroken::run::read_journal(&path).unwrap().events;
    let overrides: Vec<_> = events.iter().filter(|event| event.kind == "override").collect();
    assert_eq!(overrides.len(), 1);
    assert_eq!(
        overrides[0].fields[0],
        ("name".to_owned(), Value::from("plan.epochs"))
    );
}

#[test]
fn a_finished_run_trains_nothing_more() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    let hidden = Hidden::default();
    go(options(&path, &hidden), &hidden, loader(), u64::MAX).unwrap();
    let before = records(&path);
    let mut model = Model::new();
    let mut training = options(&path, &hidden).start(&mut model).unwrap();
    assert!(training.is_finished());
    assert_eq!(model.count, 21);
    assert_eq!(training.next_epoch(&mut model).unwrap(), None);
    drop(training);
    assert_eq!(records(&path), before);
}

#[test]
fn a_step_that_is_not_committed_and_state_that_is_not_taken_are_refused() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    let mut model = Model::new();
    let mut training = plain_options(&path).start(&mut model).unwrap();
    let mut loader = loader();
    assert!(
        training
            .next_step(&mut loader)
            .err()
            .unwrap()
            .to_string()
            .contains("next_epoch")
    );
    training.next_epoch(&mut model).unwrap();
    drop(training.next_step(&mut loader).unwrap().unwrap());
    assert!(
        training
            .next_step(&mut loader)
            .err()
            .unwrap()
            .to_string()
            .contains("step 1 was not committed")
    );
    assert!(training.next_epoch(&mut model).is_err());
    drop(training);

    struct Half(Model);
    impl Stateful for Half {
        fn state<'a>(&'a mut self, out: &mut StateWriter<'a>) -> Result<()> {
            self.0.state(out)
        }
        fn restore(&mut self, from: &mut StateReader<'_>) -> Result<()> {
            from.tensor_into("weights", &[8], &mut self.0.weights)
        }
    }
    let error = plain_options(&path).start(&mut Half(Model::new())).err().unwrap();
    assert!(
        error.to_string().contains("did not take `optimizer`, `count`"),
        "{error}"
    );
}

#[test]
fn the_full_journal_names_a_part_that_the_sample_has_not_reached_yet() {
    let home = tempfile::tempdir().unwrap();
    let run = |name: &str, spoiled: bool| {
        let path = home.path().join(name);
        let hidden = Hidden::default();
        let (mut model, mut loader) = (Model::new(), loader());
        let mut training = options(&path, &hidden)
            .journal(Level::Full)
            .start(&mut model)
            .unwrap();
        training.next_epoch(&mut model).unwrap();
        let mut step = training.next_step(&mut loader).unwrap().unwrap();
        model.train(&step.take(), 0.0);
        model.momentum[3] += if spoiled { f32::EPSILON * 100.0 } else { 0.0 };
        step.commit(&mut model).unwrap();
        records(&path)[0].clone()
    };
    let difference = unbroken::journal::first_difference(&run("a", false), &run("b", true)).unwrap();
    assert_eq!(difference.0, "state/optimizer");
}

/// Each epoch is left after five of its seven steps, which is decided before a step is asked for.
#[test]
fn an_epoch_that_is_left_early_is_left_at_the_same_step_after_any_cut() {
    let short = |options: Options, hidden: &Hidden, until: u64| -> Result<()> {
        let (mut model, mut loader) = (Model::new(), loader());
        let mut training = options.start(&mut model)?;
        while training.next_epoch(&mut model)?.is_some() {
            while training.position() < 5 {
                let Some(mut step) = training.next_step(&mut loader)? else {
                    break;
                };
                let loss = model.train(&step.take(), hidden.draw());
                step.log("loss", loss);
                step.commit(&mut model)?;
                if training.step() == until {
                    return Ok(());
                }
            }
            training.leave_epoch()?;
            training.log("after", hidden.draw());
        }
        Ok(())
    };
    let home = tempfile::tempdir().unwrap();
    let reference = home.path().join("reference");
    let hidden = Hidden::default();
    short(options(&reference, &hidden), &hidden, u64::MAX).unwrap();
    let expected = records(&reference);
    assert_eq!(expected.len(), 15 + 3);
    assert_eq!(expected[4].position, 5);
    assert_eq!(
        (expected[5].epoch, expected[5].position, expected[5].phase),
        (1, 0, 1)
    );
    // Checkpoints come every 5 steps: also right after the last step before an epoch is left.
    for until in [3, 5, 7, 10, 14, 15] {
        let path = home.path().join(format!("cut-{until}"));
        for life in [until, u64::MAX] {
            let hidden = Hidden::default();
            hidden.0.set(until + 1);
            let policy = Policy::every_steps(5).not_at_epoch_ends();
            short(options(&path, &hidden).policy(policy), &hidden, life).unwrap();
        }
        assert_eq!(records(&path), expected, "cut after step {until}");
    }
}

/// The program stops early in its second epoch's after-work. A kill strikes before the completion is saved: what is the
/// newest checkpoint then must not be one from which the next life trains on.
#[test]
fn a_run_that_was_stopped_early_stops_there_again_after_a_kill() {
    let early = |path: &Path| -> Result<Training> {
        let (mut model, mut loader) = (Model::new(), loader());
        let options = plain_options(path).policy(Policy::every_steps(4));
        let mut training = options.start(&mut model)?;
        while let Some(epoch) = training.next_epoch(&mut model)? {
            while let Some(mut step) = training.next_step(&mut loader)? {
                model.train(&step.take(), 0.0);
                step.commit(&mut model)?;
            }
            if epoch == 1 {
                training.finish(&mut model)?;
            }
        }
        Ok(training)
    };
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("run");
    assert!(early(&path).unwrap().is_finished());
    let expected = records(&path);
    let finished = unbroken::run::read_checkpoint(&path).unwrap().info().path.clone();
    assert_eq!(unbroken::run::read_checkpoint(&path).unwrap().info().phase, 2);
    std::fs::remove_file(finished).unwrap();
    let training = early(&path).unwrap();
    assert!(training.is_finished());
    assert_eq!(training.step(), 14);
    assert_eq!(records(&path), expected);
}
