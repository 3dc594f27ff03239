//! `unbroken watch`: a live run in the terminal, from its journal alone.
//!
//! Touches: a run directory, read only, without its lock.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;
use unbroken::format::journal::Component;
use unbroken::journal::{Boundary, DIVERGED, Story};
use unbroken::run::{read_run, read_story};

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::words::line;

#[derive(Debug, Args)]
pub(crate) struct Watch {
    /// Run directory
    pub(crate) run: PathBuf,
    /// Seconds between two looks
    #[arg(long, value_name = "S", default_value_t = 1.0)]
    pub(crate) every: f64,
    /// Look once
    #[arg(long)]
    pub(crate) once: bool,
}

/// Characters of a curve.
const WIDTH: usize = 60;

pub(crate) fn run(command: &Watch, streams: &mut Streams) -> Answer {
    if !(0.05..=86_400.0).contains(&command.every) {
        return Err(Failure::new(format!(
            "--every {} is not between 0.05 and 86400 seconds",
            command.every
        )));
    }
    let mut shown = None;
    loop {
        let begun = Instant::now();
        let glance = Glance::at(&read_story(&command.run)?)?;
        let text = glance.status();
        if shown.as_ref() != Some(&text) {
            streams.say(&text)?;
            streams.out.flush()?;
            shown = Some(text);
        }
        let newest = read_run(&command.run)?.checkpoints.pop();
        let finished = newest.is_some_and(|checkpoint| checkpoint.info().phase == 2);
        if finished {
            streams.say("the run is complete")?;
        }
        if command.once || finished {
            return Ok(Verdict::yes_if(glance.diverged.is_none()));
        }
        // The journal of a long run takes a while to read: looking must not become this machine's work.
        std::thread::sleep(Duration::from_secs_f64(command.every).max(begun.elapsed() * 4));
    }
}

/// What one pass over the journal tells.
#[derive(Debug, Default)]
struct Glance {
    /// (step, epoch) of the last boundary.
    last: Option<(u64, u64)>,
    life: u32,
    again: usize,
    /// (step, life) of the first difference between two executions of a step.
    diverged: Option<(u64, u32)>,
    /// The logged number that the last boundary with one has first, its value, and its course.
    logged: Option<(String, f64)>,
    courses: BTreeMap<String, Course>,
}

impl Glance {
    fn at(story: &Story) -> Result<Glance, Failure> {
        let diverged = story.events.iter().find(|event| event.kind == DIVERGED);
        let mut glance = Glance {
            life: story.last_life,
            diverged: diverged.map(|event| (event.step, event.life)),
            ..Glance::default()
        };
        for boundary in story.boundaries() {
            glance.take(&boundary?);
        }
        Ok(glance)
    }

    fn take(&mut self, boundary: &Boundary) {
        self.last = Some((boundary.step, boundary.epoch));
        self.again += usize::from(boundary.lives.len() > 1);
        let mut first = true;
        for (name, component) in &boundary.components {
            let Some(value) = number(component).filter(|_| name.starts_with("log/")) else {
                continue;
            };
            if std::mem::take(&mut first) {
                self.logged = Some((name.clone(), value));
            }
            match self.courses.get_mut(name) {
                Some(course) => course.push(value),
                None => self.courses.entry(name.clone()).or_default().push(value),
            }
        }
    }

    /// One line: where the run is, in which life, how its loss went, whether it repeated itself.
    fn status(&self) -> String {
        let Some((step, epoch)) = self.last else {
            return "no step is recorded yet".to_owned();
        };
        let mut text = format!("step {step} epoch {epoch} life {}", self.life);
        if let Some((name, value)) = &self.logged {
            let short = line(name.strip_prefix("log/").unwrap_or(name));
            let course = self.courses.get(name).map(Course::blocks).unwrap_or_default();
            text.push_str(&format!(" {short} {value:.5} {course}"));
        }
        if let Some((step, life)) = self.diverged {
            text.push_str(&format!(
                " NOT EXACT: step {step} came out differently in life {life}"
            ));
        } else if self.again > 0 {
            text.push_str(&format!(" {} executed again: identical", self.again));
        }
        text
    }
}

fn number(component: &Component) -> Option<f64> {
    match component {
        Component::Float(bits) => Some(f64::from_bits(*bits)),
        Component::Int(number) => Some(*number as f64),
        _ => None,
    }
}

/// A number's course in bounded memory: means of equally many values each.
#[derive(Debug)]
struct Course {
    /// Values that one mean is of.
    size: u32,
    /// Sum and count, the last one perhaps of fewer.
    sums: Vec<(f64, u32)>,
}

impl Default for Course {
    fn default() -> Course {
        Course {
            size: 1,
            sums: Vec::new(),
        }
    }
}

impl Course {
    fn push(&mut self, value: f64) {
        if !value.is_finite() {
            return;
        }
        match self.sums.last_mut().filter(|(_, count)| *count < self.size) {
            Some((sum, count)) => (*sum, *count) = (*sum + value, *count + 1),
            None => self.sums.push((value, 1)),
        }
        if self.sums.len() > WIDTH && self.sums.last().is_some_and(|(_, count)| *count == self.size) {
            self.size *= 2;
            let pairs = self.sums.chunks(2);
            self.sums = pairs
                .map(|pair| {
                    pair.iter()
                        .fold((0.0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
                })
                .collect();
        }
    }

    /// As a row of blocks.
    fn blocks(&self) -> String {
        const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let means: Vec<f64> = self
            .sums
            .iter()
            .map(|(sum, count)| sum / f64::from(*count))
            .collect();
        let low = means.iter().copied().fold(f64::INFINITY, f64::min);
        let span = means.iter().copied().fold(f64::NEG_INFINITY, f64::max) - low;
        let block = |mean: &f64| {
            if span > 0.0 {
                BLOCKS[(((mean - low) / span) * 7.0).round() as usize]
            } else {
                BLOCKS[0]
            }
        };
        means.iter().map(block).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glance(losses: &[f64]) -> Glance {
        let mut glance = Glance {
            life: 2,
            ..Glance::default()
        };
        for (index, loss) in losses.iter().enumerate() {
            glance.take(&Boundary {
                step: index as u64 + 1,
                phase: 0,
                epoch: 0,
                position: index as u64 + 1,
                components: vec![("log/loss".into(), Component::Float(loss.to_bits()))],
                lives: if index < 2 { vec![1, 2] } else { vec![2] },
            });
        }
        glance
    }

    #[test]
    fn one_line_says_where_the_run_is_and_how_it_went() {
        assert_eq!(
            glance(&[2.0, 1.5, 1.0]).status(),
            "step 3 epoch 0 life 2 loss 1.00000 █▅▁ 2 executed again: identical"
        );
        assert_eq!(Glance::default().status(), "no step is recorded yet");
    }

    #[test]
    fn a_long_run_fits_on_the_line() {
        let falling: Vec<f64> = (0..5000).map(|step| -f64::from(step)).collect();
        let text = glance(&falling).status();
        assert!(text.chars().count() < 140, "{text}");
        assert!(text.contains('█') && text.contains('▁'), "{text}");
        assert!(!glance(&[f64::NAN, f64::INFINITY]).status().contains('█'));
    }
}
