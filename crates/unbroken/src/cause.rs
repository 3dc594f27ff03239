//! The likely cause of a difference in words, from a small catalogue of signatures that known faults leave behind.
//!
//! Touches: nothing. Pure functions over what two executions recorded. A cause is a guess and is worded as one: what
//! differs first is a fact that others establish; why, only the person who knows the program can say for certain.

use crate::elements::{Elements, Pattern};
use crate::format::journal::Component;

/// One boundary's components, in causal order.
pub type Components = [(String, Component)];

/// What one execution recorded around the first difference.
#[derive(Clone, Copy, Debug, Default)]
pub struct Window<'a> {
    /// At the boundary one step before, if recorded.
    pub before: Option<&'a Components>,
    /// At the first boundary that differs.
    pub at: &'a Components,
    /// At the boundary one step after, if recorded.
    pub after: Option<&'a Components>,
}

/// How one leaf of a checkpoint differs from the same leaf of another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Its numbers differ.
    Elements {
        /// Their dtype.
        dtype: String,
        /// How.
        elements: Elements,
    },
    /// Its numbers differ, and are not at hand: digests of what they are.
    Content {
        /// What was expected.
        expected: String,
        /// What was found.
        found: String,
    },
    /// Its numbers are the same, and it lies in memory in another way.
    Layout {
        /// What was expected, for people.
        expected: String,
        /// What was found, for people.
        found: String,
    },
    /// Its shape, dtype or type differs, or it is a plain value with another value.
    Value {
        /// What was expected, for people.
        expected: String,
        /// What was found, for people.
        found: String,
    },
    /// It is not there.
    Missing,
    /// It was not expected.
    Extra,
    /// Neither its numbers nor a digest of them are at hand.
    Unknown,
}

/// One leaf that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leaf {
    /// Where it is in the tree, parts separated by `/`.
    pub path: String,
    /// How it differs.
    pub change: Change,
}

/// What is known about a difference.
#[derive(Clone, Debug, Default)]
pub struct Situation<'a> {
    /// 0: after a step. 1: after an epoch's after-work. 2: at the end.
    pub phase: u8,
    /// The first component that differs.
    pub component: &'a str,
    /// Whether the execution that was found had been resumed immediately before the boundary that differs.
    pub first_after_resume: bool,
    /// Whether either execution was resumed at all.
    pub resumed: bool,
    /// What was recorded where the two were expected to be equal.
    pub expected: Window<'a>,
    /// What the execution in question recorded.
    pub found: Window<'a>,
    /// Settings that differ: name, expected, found.
    pub settings: &'a [(String, String, String)],
    /// Leaves that differ between the checkpoint and what was restored from it, in causal order.
    pub restored: &'a [Leaf],
    /// Leaves that differ between the two states at the boundary that differs, in causal order.
    pub leaves: &'a [Leaf],
}

/// A likely cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// Which entry of the catalogue, for programs.
    pub id: &'static str,
    /// What probably happened and what to look at, for people.
    pub words: String,
}

fn cause(id: &'static str, words: impl Into<String>) -> Option<Cause> {
    Some(Cause {
        id,
        words: words.into(),
    })
}

/// Names the likely cause of a difference, or nothing where no signature fits.
///
/// What differs already when a checkpoint is restored speaks loudest, then what the two histories look like.
pub fn likely(situation: &Situation) -> Option<Cause> {
    threads(situation)
        .or_else(|| restored(situation))
        .or_else(|| data(situation))
        .or_else(|| generator(situation))
        .or_else(|| schedule(situation))
        .or_else(|| repeated(situation))
        .or_else(|| arithmetic(situation))
}

/// Returns the value of one component.
fn value<'a>(components: &'a Components, name: &str) -> Option<&'a Component> {
    components
        .iter()
        .find(|(found, _)| found == name)
        .map(|(_, value)| value)
}

/// Whether what was found at the boundary is what was expected at another one.
fn found_is(situation: &Situation, name: &str, expected: Option<&Components>) -> bool {
    let found = value(situation.found.at, name);
    found.is_some() && found == expected.and_then(|components| value(components, name))
}

/// Whether a component is recorded by both and differs at the boundary.
fn differs(situation: &Situation, name: &str) -> bool {
    match (
        value(situation.expected.at, name),
        value(situation.found.at, name),
    ) {
        (Some(expected), Some(found)) => expected != found,
        _ => false,
    }
}

fn threads(situation: &Situation) -> Option<Cause> {
    if situation.component.starts_with("data/") || situation.component.starts_with("rng/") {
        return None;
    }
    let (name, expected, found) = situation
        .settings
        .iter()
        .find(|(name, _, _)| name.starts_with("threads"))?;
    cause(
        "threads-changed",
        format!(
            "the thread count changed ({name} was {expected}, is {found}): sums are split differently and round differently"
        ),
    )
}

fn restored(situation: &Situation) -> Option<Cause> {
    situation.restored.iter().find_map(leaf_cause).or_else(|| {
        let leaf = situation.restored.first()?;
        cause(
            "not-restored",
            format!(
                "`{}` is not what the checkpoint holds right after the resume",
                leaf.path
            ),
        )
    })
}

/// Names the likely cause of one leaf not being what its checkpoint says.
pub fn leaf_cause(leaf: &Leaf) -> Option<Cause> {
    let path = leaf.path.as_str();
    // Names of parameters and buffers have parts of their own: `1.running_mean`.
    let part = |name: &str| path.split(['/', '.']).any(|part| part == name);
    let under = |name: &str| path.split('/').any(|part| part.to_lowercase().contains(name));
    let pattern = match &leaf.change {
        Change::Elements { elements, .. } => elements.pattern,
        _ => None,
    };
    if part("generators") {
        let name = ["python", "numpy", "torch", "cuda"]
            .into_iter()
            .find(|name| part(name))
            .unwrap_or("a");
        return cause(
            "generator-not-restored",
            format!("{name}'s generator was not restored"),
        );
    }
    if part("loaders") {
        if under("worker") {
            return cause(
                "worker-generator-not-restored",
                "a loader worker's generators were not restored",
            );
        }
        return cause(
            "loader-not-restored",
            format!("the loader's place or order was not restored: `{path}`"),
        );
    }
    if under("ema") || under("swa") || under("averaged") || part("n_averaged") {
        return cause(
            "average-not-restored",
            "the averaged weights (EMA or SWA) were not restored",
        );
    }
    if under("scaler") {
        return cause(
            "scaler-reset",
            "the gradient scaler was reset: its scale and growth counter are state too",
        );
    }
    if part("running_mean") || part("running_var") || part("num_batches_tracked") {
        return cause(
            "batch-norm-reset",
            "a batch-norm buffer was reset: running statistics are state too",
        );
    }
    let number = |change: &Change| match change {
        Change::Value { expected, found } => {
            Some((expected.parse::<i64>().ok()?, found.parse::<i64>().ok()?))
        }
        _ => None,
    };
    if under("sched") {
        return match number(&leaf.change) {
            Some((expected, found)) if found == expected - 1 => {
                cause("schedule-late", "the learning rate's schedule is one step late")
            }
            _ => cause(
                "schedule-not-restored",
                "the learning rate's schedule was not restored",
            ),
        };
    }
    let moments = [
        "exp_avg",
        "exp_avg_sq",
        "max_exp_avg_sq",
        "momentum_buffer",
        "square_avg",
        "sum",
    ];
    let Change::Elements { dtype, elements } = &leaf.change else {
        return None;
    };
    match pattern {
        Some(Pattern::Zeros) if moments.into_iter().any(part) => cause(
            "moments-zeroed",
            "the optimizer's moments were zeroed: its state was not restored",
        ),
        Some(Pattern::RoundedToBfloat16) => {
            cause("cast-to-bfloat16", "state was cast to bfloat16 on its way")
        }
        Some(Pattern::RoundedToFloat16) => cause("cast-to-float16", "state was cast to float16 on its way"),
        Some(Pattern::RoundedToFloat32) => cause("cast-to-float32", "state was cast to float32 on its way"),
        _ if dtype.contains("float") && elements.max_ulps <= 4 && elements.not_numbers == 0 => cause(
            "rounded",
            format!(
                "`{path}` is {} off: it was computed again or converted instead of copied",
                ulps(elements.max_ulps)
            ),
        ),
        _ => None,
    }
}

/// A distance for people.
pub fn ulps(count: u64) -> String {
    if count == 1 {
        "1 ulp".to_owned()
    } else {
        format!("{count} ulps")
    }
}

fn data(situation: &Situation) -> Option<Cause> {
    let name = situation.component;
    if !name.starts_with("data/") {
        return None;
    }
    let found_before = situation
        .found
        .before
        .and_then(|components| value(components, name));
    let is_next = found_is(situation, name, situation.expected.after);
    let swapped_back = situation
        .found
        .after
        .and_then(|components| value(components, name))
        == value(situation.expected.at, name);
    if found_is(situation, name, situation.expected.before) || found_before == value(situation.found.at, name)
    {
        return cause(
            "batch-repeated",
            "one batch came twice: a step was executed that the checkpoint already holds",
        );
    }
    if is_next && swapped_back {
        return cause("batches-swapped", "two batches changed places");
    }
    if is_next {
        return cause(
            "batch-skipped",
            "one batch was left out: the loader was put back one batch too far",
        );
    }
    if name == "data/indices" {
        return cause(
            "order-differs",
            "the order of the data differs: the generator that the sampler draws from was not restored, or not seeded",
        );
    }
    let drawn: Vec<&str> = ["python", "numpy", "torch"]
        .into_iter()
        .filter(|generator| differs(situation, &format!("rng/{generator}")))
        .collect();
    if value(situation.expected.at, "data/indices").is_none() || differs(situation, "data/indices") {
        return None;
    }
    match drawn.first() {
        Some(generator) => cause(
            "generator-not-restored",
            format!(
                "{generator}'s generator was not restored, or not seeded: the same items were loaded and augmented differently"
            ),
        ),
        None => cause(
            "worker-generator-not-restored",
            "the same items were loaded and augmented differently while the training's own generators agree: a loader \
             worker's generator, or one that the data set holds, was not restored or not seeded",
        ),
    }
}

fn generator(situation: &Situation) -> Option<Cause> {
    let name = situation.component.strip_prefix("rng/")?;
    let state_agrees = !situation.expected.at.iter().any(|(component, _)| {
        (component.starts_with("state/") || component.starts_with("log/")) && differs(situation, component)
    });
    if situation.phase > 0 {
        return cause(
            "evaluation-drew",
            format!(
                "the work after the epoch drew a different number of values from {name}'s generator: evaluation that \
                 draws belongs in `with run.aside():`"
            ),
        );
    }
    if situation.first_after_resume && state_agrees {
        return cause(
            "generator-not-restored",
            format!(
                "{name}'s generator was not restored, or something drew from it between the resume and the first step"
            ),
        );
    }
    if situation.first_after_resume {
        return cause(
            "generator-not-restored",
            format!("{name}'s generator was not restored"),
        );
    }
    cause(
        "drew-differently",
        format!(
            "something drew a different number of values from {name}'s generator, or it was never seeded"
        ),
    )
}

fn schedule(situation: &Situation) -> Option<Cause> {
    let name = situation.component;
    if !name.starts_with("lr/") {
        return None;
    }
    if found_is(situation, name, situation.expected.before) {
        return cause("schedule-late", "the learning rate's schedule is one step late");
    }
    if found_is(situation, name, situation.expected.after) {
        return cause("schedule-early", "the learning rate's schedule is one step early");
    }
    cause(
        "schedule-not-restored",
        "the learning rate's schedule was not restored, or was built with other numbers",
    )
}

fn repeated(situation: &Situation) -> Option<Cause> {
    let name = situation.component;
    let logged_before = name.starts_with("log/") && found_is(situation, name, situation.expected.before);
    if logged_before
        && situation.expected.before.and_then(|c| value(c, name)) != value(situation.expected.at, name)
    {
        return cause(
            "step-repeated",
            "what was logged is what the step before logged: a step was counted twice",
        );
    }
    None
}

fn arithmetic(situation: &Situation) -> Option<Cause> {
    let name = situation.component;
    if situation.first_after_resume {
        return situation.leaves.iter().find_map(leaf_cause).or_else(|| match name {
            "state/scaler" => cause("scaler-reset", "the gradient scaler was reset: its scale and growth counter are state too"),
            _ if name.starts_with("log/") || name.starts_with("state/") => cause(
                "state-not-restored",
                "data, generators and learning rate agree and the result does not: something that the step computes with was not restored, such as a variable or a generator of the program's own that the run does not track",
            ),
            _ => None,
        });
    }
    if name.starts_with("log/") || name.starts_with("state/") {
        if situation.phase > 0 {
            return cause(
                "after-work-changed-state",
                "the work after the epoch changed the state: evaluation in training mode moves batch-norm statistics",
            );
        }
        return cause(
            "not-deterministic",
            "data, generators and learning rate agree and the result does not: an operator is not deterministic, or the step depends on something that is not recorded",
        );
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn boundary(values: &[(&str, i64)]) -> Vec<(String, Component)> {
        values
            .iter()
            .map(|(name, value)| ((*name).to_owned(), Component::Int(*value)))
            .collect()
    }

    fn elements(pattern: Option<Pattern>, max_ulps: u64) -> Change {
        let elements = Elements {
            total: 8,
            differing: 1,
            first: 0,
            max_ulps,
            not_numbers: 0,
            pattern,
        };
        Change::Elements {
            dtype: "float32".into(),
            elements,
        }
    }

    fn leaf(path: &str, change: Change) -> Leaf {
        Leaf {
            path: path.into(),
            change,
        }
    }

    /// The cause where `component` has these values in (expected, found) before, at and after.
    fn id_of(
        component: &str,
        expected: [i64; 3],
        found: [i64; 3],
        more: &[(&str, i64, i64)],
    ) -> &'static str {
        let rows = |values: [i64; 3], side: usize| {
            values.map(|value| {
                let mut row = boundary(&[(component, value)]);
                for (name, old, new) in more {
                    row.push((
                        (*name).into(),
                        Component::Int(if side == 0 { *old } else { *new }),
                    ));
                }
                row
            })
        };
        let (expected, found) = (rows(expected, 0), rows(found, 1));
        let window = |rows: &'static [Vec<(String, Component)>; 3]| Window {
            before: Some(&rows[0]),
            at: &rows[1],
            after: Some(&rows[2]),
        };
        let situation = Situation {
            component: Box::leak(component.to_owned().into_boxed_str()),
            first_after_resume: true,
            resumed: true,
            expected: window(Box::leak(Box::new(expected))),
            found: window(Box::leak(Box::new(found))),
            ..Situation::default()
        };
        likely(&situation).map_or("none", |cause| cause.id)
    }

    #[test]
    fn batches_that_moved_are_told_apart() {
        assert_eq!(
            id_of("data/indices", [1, 2, 3], [1, 3, 2], &[]),
            "batches-swapped"
        );
        assert_eq!(id_of("data/indices", [1, 2, 3], [1, 3, 4], &[]), "batch-skipped");
        assert_eq!(id_of("data/indices", [1, 2, 3], [1, 1, 2], &[]), "batch-repeated");
        assert_eq!(id_of("data/indices", [1, 2, 3], [1, 8, 9], &[]), "order-differs");
    }

    #[test]
    fn other_augmentation_of_the_same_items_names_the_generator_that_differs_with_it() {
        let same = ("data/indices", 5, 5);
        assert_eq!(
            id_of("data/batch", [1, 2, 3], [1, 8, 9], &[same]),
            "worker-generator-not-restored"
        );
        let python = ("rng/python", 1, 2);
        assert_eq!(
            id_of("data/batch", [1, 2, 3], [1, 8, 9], &[same, python]),
            "generator-not-restored"
        );
    }

    #[test]
    fn a_schedule_is_late_early_or_another() {
        assert_eq!(
            id_of("lr/optimizer/0", [1, 2, 3], [1, 1, 2], &[]),
            "schedule-late"
        );
        assert_eq!(
            id_of("lr/optimizer/0", [1, 2, 3], [1, 3, 4], &[]),
            "schedule-early"
        );
        assert_eq!(
            id_of("lr/optimizer/0", [1, 2, 3], [1, 9, 9], &[]),
            "schedule-not-restored"
        );
    }

    #[test]
    fn a_generator_that_differs_after_the_epoch_points_at_evaluation() {
        let (expected, found) = (boundary(&[("rng/torch", 1)]), boundary(&[("rng/torch", 2)]));
        let mut situation = Situation {
            phase: 1,
            component: "rng/torch",
            expected: Window {
                at: &expected,
                ..Window::default()
            },
            found: Window {
                at: &found,
                ..Window::default()
            },
            ..Situation::default()
        };
        assert_eq!(likely(&situation).unwrap().id, "evaluation-drew");
        situation.phase = 0;
        assert_eq!(likely(&situation).unwrap().id, "drew-differently");
        situation.first_after_resume = true;
        assert_eq!(likely(&situation).unwrap().id, "generator-not-restored");
    }

    #[test]
    fn arithmetic_that_differs_without_a_resume_is_not_deterministic_unless_threads_changed() {
        let (expected, found) = (boundary(&[("log/loss", 1)]), boundary(&[("log/loss", 2)]));
        let mut situation = Situation {
            component: "log/loss",
            expected: Window {
                at: &expected,
                ..Window::default()
            },
            found: Window {
                at: &found,
                ..Window::default()
            },
            ..Situation::default()
        };
        assert_eq!(likely(&situation).unwrap().id, "not-deterministic");
        let settings = [("threads.intra_op".to_owned(), "1".to_owned(), "2".to_owned())];
        situation.settings = &settings;
        let cause = likely(&situation).unwrap();
        assert_eq!(cause.id, "threads-changed");
        assert!(cause.words.contains("was 1, is 2"), "{}", cause.words);
    }

    #[test]
    fn a_leaf_that_was_not_restored_names_its_fault() {
        let cases = [
            (
                leaf(
                    "objects/optimizer/state/w/exp_avg",
                    elements(Some(Pattern::Zeros), 9),
                ),
                "moments-zeroed",
            ),
            (
                leaf("objects/optimizer/state/w/exp_avg", elements(None, 1)),
                "rounded",
            ),
            (
                leaf("objects/model/w", elements(Some(Pattern::RoundedToBfloat16), 99)),
                "cast-to-bfloat16",
            ),
            (
                leaf("objects/model/bn/running_var", elements(Some(Pattern::Ones), 99)),
                "batch-norm-reset",
            ),
            (
                leaf("objects/ema/module/w", elements(None, 99)),
                "average-not-restored",
            ),
            (
                leaf(
                    "objects/scheduler/last_epoch",
                    Change::Value {
                        expected: "12".into(),
                        found: "11".into(),
                    },
                ),
                "schedule-late",
            ),
            (
                leaf(
                    "generators/numpy",
                    Change::Value {
                        expected: "a".into(),
                        found: "b".into(),
                    },
                ),
                "generator-not-restored",
            ),
            (
                leaf("loaders/loader/state/workers/0", Change::Missing),
                "worker-generator-not-restored",
            ),
            (
                leaf(
                    "objects/scaler/scale",
                    Change::Value {
                        expected: "8".into(),
                        found: "1".into(),
                    },
                ),
                "scaler-reset",
            ),
        ];
        for (leaf, id) in cases {
            assert_eq!(leaf_cause(&leaf).unwrap().id, id, "{leaf:?}");
        }
        assert_eq!(leaf_cause(&leaf("objects/model/w", elements(None, 1000))), None);
    }

    #[test]
    fn what_was_restored_wrongly_speaks_before_the_journal_does() {
        let restored = [leaf(
            "objects/model/norm/running_mean",
            elements(Some(Pattern::Zeros), 99),
        )];
        let situation = Situation {
            component: "log/loss",
            restored: &restored,
            ..Situation::default()
        };
        assert_eq!(likely(&situation).unwrap().id, "batch-norm-reset");
    }
}
