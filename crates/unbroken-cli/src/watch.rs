//! `unbroken watch`: a live run in the terminal, from its journal alone.
//!
//! Touches: a run directory, read only, without its lock.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use unbroken::format::journal::Component;
use unbroken::journal::Journal;
use unbroken::run::{read_journal, read_run};

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
        let journal = read_journal(&command.run)?;
        let text = status(&journal);
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
            return Ok(Verdict::yes_if(
                !journal.events.iter().any(|event| event.kind == "diverged"),
            ));
        }
        std::thread::sleep(Duration::from_secs_f64(command.every));
    }
}

/// One line: where the run is, in which life, how its loss went, whether it repeated itself.
fn status(journal: &Journal) -> String {
    let Some(last) = journal.boundaries.last() else {
        return "no step is recorded yet".to_owned();
    };
    let mut text = format!(
        "step {} epoch {} life {}",
        last.step, last.epoch, journal.last_life
    );
    let logged = journal.boundaries.iter().rev().find_map(|boundary| {
        boundary
            .components
            .iter()
            .find(|(name, value)| name.starts_with("log/") && number(value).is_some())
    });
    if let Some((name, value)) = logged {
        let short = line(name.strip_prefix("log/").unwrap_or(name));
        text.push_str(&format!(
            " {short} {:.5} {}",
            number(value).unwrap_or(f64::NAN),
            curve(journal, name)
        ));
    }
    let again = journal
        .boundaries
        .iter()
        .filter(|boundary| boundary.lives.len() > 1)
        .count();
    if let Some(event) = journal.events.iter().find(|event| event.kind == "diverged") {
        text.push_str(&format!(
            " NOT EXACT: step {} came out differently in life {}",
            event.step, event.life
        ));
    } else if again > 0 {
        text.push_str(&format!(" {again} executed again: identical"));
    }
    text
}

fn number(component: &Component) -> Option<f64> {
    match component {
        Component::Float(bits) => Some(f64::from_bits(*bits)),
        Component::Int(number) => Some(*number as f64),
        _ => None,
    }
}

/// A number's course as a row of blocks, the mean of as many steps each as fit.
fn curve(journal: &Journal, name: &str) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let values: Vec<f64> = journal
        .boundaries
        .iter()
        .filter_map(|boundary| boundary.components.iter().find(|(found, _)| found == name))
        .filter_map(|(_, value)| number(value))
        .filter(|value| value.is_finite())
        .collect();
    let size = values.len().div_ceil(WIDTH).max(1);
    let means: Vec<f64> = values
        .chunks(size)
        .map(|chunk| chunk.iter().sum::<f64>() / chunk.len() as f64)
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

#[cfg(test)]
mod tests {
    use super::*;
    use unbroken::journal::Boundary;

    fn journal(losses: &[f64]) -> Journal {
        let boundaries = losses.iter().enumerate().map(|(index, loss)| Boundary {
            step: index as u64 + 1,
            phase: 0,
            epoch: 0,
            position: index as u64 + 1,
            components: vec![("log/loss".into(), Component::Float(loss.to_bits()))],
            lives: if index < 2 { vec![1, 2] } else { vec![2] },
        });
        let mut journal = Journal::default();
        journal.boundaries = boundaries.collect();
        journal.last_life = 2;
        journal
    }

    #[test]
    fn one_line_says_where_the_run_is_and_how_it_went() {
        let text = status(&journal(&[2.0, 1.5, 1.0]));
        assert_eq!(
            text,
            "step 3 epoch 0 life 2 loss 1.00000 █▅▁ 2 executed again: identical"
        );
        assert_eq!(status(&Journal::default()), "no step is recorded yet");
    }

    #[test]
    fn a_long_run_fits_on_the_line() {
        let text = status(&journal(
            &(0..5000).map(|step| f64::from(step % 7)).collect::<Vec<_>>(),
        ));
        assert!(text.chars().count() < 140, "{text}");
        assert!(!status(&journal(&[f64::NAN, f64::INFINITY])).contains('█'));
    }
}
