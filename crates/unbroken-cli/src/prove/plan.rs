//! Which trials to make: where the training is killed, as a pure function of a seed and of what the reference did.
//!
//! Touches: nothing.

/// One interruption of one life.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Stop {
    /// `kill -9` when the program reaches a point, after so many milliseconds there.
    KillAt { at: Point, delay_ms: f64 },
    /// SIGTERM when the program reaches a point.
    TermAt { at: Point },
    /// `kill -9` from outside, after this part of the uninterrupted run, and this part of a step's time later.
    KillAfter { fraction: f64, jitter: f64 },
}

impl Stop {
    /// `kill -9` right at a point.
    pub(crate) fn kill_at(at: Point) -> Stop {
        Stop::KillAt { at, delay_ms: 0.0 }
    }

    /// For people: `kill -9 at step 17`.
    pub(crate) fn words(&self) -> String {
        match self {
            Stop::KillAt { at, .. } => format!("kill -9 {}", at.words()),
            Stop::TermAt { at } => format!("SIGTERM {}", at.words()),
            Stop::KillAfter { .. } => "kill -9 at a random instant".to_owned(),
        }
    }
}

/// A place in the course of a run that the program itself notices (see python/unbroken/proving.py).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Point {
    kind: &'static str,
    number: u64,
    /// The run that is meant, where the program makes several.
    run: Option<String>,
}

impl Point {
    pub(crate) fn new(kind: &'static str, number: u64, run: Option<String>) -> Point {
        Point { kind, number, run }
    }

    /// As the program reads it: KIND:NUMBER, then `more`, then @RUN.
    pub(crate) fn variable(&self, more: &str) -> String {
        let run = self.run.as_ref().map_or(String::new(), |run| format!("@{run}"));
        format!("{}:{}{more}{run}", self.kind, self.number)
    }

    fn words(&self) -> String {
        let number = self.number;
        let place = match self.kind {
            "saving" => format!("during the save at step {number}"),
            "work" => format!("in the work after epoch {number}"),
            _ => format!("at step {number}"),
        };
        match &self.run {
            Some(run) => format!("{place} of `{run}`"),
            None => place,
        }
    }
}

/// One interrupted training: a life for each stop, and a last one to its end.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Trial {
    pub(crate) stops: Vec<Stop>,
}

impl Trial {
    /// For people: what interrupts it.
    pub(crate) fn words(&self) -> String {
        if let [stop] = self.stops.as_slice() {
            return stop.words();
        }
        let parts: Vec<String> = self.stops.iter().map(Stop::words).collect();
        format!(
            "{} stops: {}",
            parts.len(),
            parts.join("; ").replace("kill -9 ", "")
        )
    }
}

/// What the uninterrupted run did, as far as plans need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Course {
    /// The run's name, where there are several.
    pub(crate) run: Option<String>,
    /// Its last step.
    pub(crate) last: u64,
    /// Steps at which it saved, without the first and the last.
    pub(crate) saves: Vec<u64>,
    /// Epochs whose after-work was done, with the step at which it was.
    pub(crate) epochs: Vec<(u64, u64)>,
}

impl Course {
    pub(crate) fn new(
        run: Option<String>,
        last: u64,
        epochs: Vec<(u64, u64)>,
        saves: impl IntoIterator<Item = u64>,
    ) -> Course {
        let saves = saves.into_iter().filter(|step| (1..last).contains(step));
        Course {
            run,
            last,
            saves: saves.collect(),
            epochs,
        }
    }
}

/// Returns trials with `kills` stops in all: one of each sort by itself first, then several in one run. Where the program
/// makes several runs, trials take turns at them.
pub(crate) fn plan(courses: &[Course], kills: usize, seed: u64) -> Vec<Trial> {
    let courses: Vec<&Course> = courses.iter().filter(|course| course.last > 0).collect();
    let mut random = Random(seed);
    let mut trials = Vec::new();
    let mut left = kills;
    let mut sort = 0;
    while left > 0 && !courses.is_empty() {
        let course = courses[trials.len() % courses.len()];
        let single = trials.len() < SORTS;
        let count = if single { 1 } else { left.min(3) };
        let mut stops: Vec<Stop> = (0..count)
            .map(|_| {
                sort += 1;
                one(course, sort - 1, &mut random)
            })
            .collect();
        // Later lives start later: points are reached only in order.
        stops.sort_by_key(|stop| reached_at(course, stop));
        trials.push(Trial { stops });
        left -= count;
    }
    trials
}

const SORTS: usize = 5;

fn one(course: &Course, sort: usize, random: &mut Random) -> Stop {
    // The last step of all is of no use: what is killed there has nothing left to do.
    let step = 1 + random.below(course.last.max(2) - 1);
    let point = |kind, number| Point::new(kind, number, course.run.clone());
    match sort % SORTS {
        1 => Stop::KillAfter {
            fraction: 0.05 + 0.85 * random.part(),
            jitter: random.part(),
        },
        2 if !course.saves.is_empty() => {
            let save = course.saves[random.below(course.saves.len() as u64) as usize];
            Stop::KillAt {
                at: point("saving", save),
                delay_ms: 0.01 + 4.0 * random.part().powi(2),
            }
        }
        3 if !course.epochs.is_empty() => {
            let (epoch, _) = course.epochs[random.below(course.epochs.len() as u64) as usize];
            Stop::KillAt {
                at: point("work", epoch),
                delay_ms: 0.01 + 2.0 * random.part(),
            }
        }
        4 => Stop::TermAt {
            at: point("step", step),
        },
        _ => Stop::kill_at(point("step", step)),
    }
}

/// About when a stop comes, in steps.
fn reached_at(course: &Course, stop: &Stop) -> u64 {
    match stop {
        Stop::KillAfter { fraction, .. } => (fraction * course.last as f64) as u64,
        Stop::KillAt { at, .. } | Stop::TermAt { at } => match at.kind {
            "work" => course
                .epochs
                .iter()
                .find(|(epoch, _)| *epoch == at.number)
                .map_or(course.last, |(_, step)| *step),
            _ => at.number,
        },
    }
}

/// SplitMix64: a few draws for plans; nothing that is stored depends on it.
#[derive(Clone, Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    /// A number below `end`, at least 1.
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    /// A number in [0, 1).
    fn part(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn course() -> Course {
        Course {
            run: None,
            last: 100,
            saves: vec![20, 40, 60, 80],
            epochs: vec![(0, 50), (1, 100)],
        }
    }

    #[test]
    fn a_plan_is_a_function_of_its_seed_and_has_as_many_stops_as_asked() {
        for kills in 0..12 {
            let trials = plan(&[course()], kills, 3);
            assert_eq!(trials, plan(&[course()], kills, 3));
            assert_eq!(trials.iter().map(|trial| trial.stops.len()).sum::<usize>(), kills);
        }
        assert_ne!(plan(&[course()], 8, 3), plan(&[course()], 8, 4));
    }

    #[test]
    fn every_sort_of_stop_comes_first_by_itself() {
        let words: Vec<String> = plan(&[course()], 5, 1).iter().map(Trial::words).collect();
        for (words, start) in words.iter().zip([
            "kill -9 at step",
            "kill -9 at a random instant",
            "kill -9 during the save at step",
            "kill -9 in the work after epoch",
            "SIGTERM at step",
        ]) {
            assert!(words.starts_with(start), "{words}");
        }
    }

    #[test]
    fn a_run_without_saves_and_epochs_is_killed_at_steps_instead() {
        let course = Course {
            run: None,
            last: 2,
            saves: vec![],
            epochs: vec![],
        };
        for trial in plan(std::slice::from_ref(&course), 8, 1) {
            for stop in trial.stops {
                assert!(
                    !stop.words().contains("save") && !stop.words().contains("work"),
                    "{stop:?}"
                );
            }
        }
        assert!(plan(&[Course { last: 0, ..course }], 8, 1).is_empty());
    }

    #[test]
    fn trials_take_turns_at_several_runs_and_each_stays_with_its_own() {
        let named = |name: &str| Course {
            run: Some(name.to_owned()),
            ..course()
        };
        let trials = plan(&[named("first"), named("second")], 8, 1);
        for (index, trial) in trials.iter().enumerate() {
            for stop in &trial.stops {
                if let Stop::KillAt { at, .. } | Stop::TermAt { at } = stop {
                    assert_eq!(
                        at.run.as_deref(),
                        Some(["first", "second"][index % 2]),
                        "{trial:?}"
                    );
                }
            }
        }
        let Stop::KillAt { at, .. } = &trials[0].stops[0] else {
            panic!("the first trial is a kill at a step");
        };
        assert_eq!(at.variable(":2.500"), format!("step:{}:2.500@first", at.number));
        assert!(trials[0].words().ends_with(" of `first`"));
    }

    #[test]
    fn stops_of_one_run_come_in_the_order_in_which_they_are_reached() {
        for seed in 0..20 {
            for trial in plan(&[course()], 11, seed) {
                let places: Vec<u64> = trial
                    .stops
                    .iter()
                    .map(|stop| reached_at(&course(), stop))
                    .collect();
                assert!(places.is_sorted(), "{trial:?}");
            }
        }
    }
}
