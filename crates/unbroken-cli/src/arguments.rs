//! What the program can be asked, and the words of its help.
//!
//! Touches: nothing.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

/// Looks at training runs and their checkpoints: what is there, whether it is whole, where two of them part.
#[derive(Debug, Parser)]
#[command(name = "unbroken", version, disable_help_subcommand = true)]
// With a blank line less than usual: all commands fit a screen.
#[command(help_template = "{about-with-newline}{usage-heading} {usage}\n\n{all-args}{after-help}")]
#[command(after_help = "\
RUN is a run directory; RUN@STEP is its checkpoint after that step, RUN alone the newest whole one.
Exit code 0: yes. 1: an honest no (differs, damaged). 2: the question could not be answered.")]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List a run's checkpoints, oldest first
    List(List),
    /// Show what a checkpoint holds
    Show(Show),
    /// Print the journal, a line for each boundary
    Log(Log),
    /// Find the first difference between two runs or two checkpoints
    Diff(Diff),
    /// Check that checkpoints and journal are whole
    Verify(Verify),
    /// Write a checkpoint's tensors to a .safetensors file
    Export(Export),
    /// Make a run of a .pt file, executing nothing of it
    Import(crate::import::Import),
    /// Start a new run at a checkpoint, sharing its tensors
    Fork(crate::fork::Fork),
    /// Put aside what is damaged, and put whole copies in its place
    Repair(crate::repair::Repair),
    /// Delete checkpoints that no rule keeps
    Prune(Prune),
    /// Try what a directory's file system does, and what the bits depend on
    Doctor(crate::doctor::Doctor),
    /// Execute recorded steps again under today's environment and compare them
    Replay(crate::replay::Replay),
    /// Execute one step twice and name the first operator that gives something else
    Trace(crate::trace::Trace),
    /// Write a page about a run, or several over each other
    Report(crate::report::Report),
    /// Follow a live run in the terminal
    Watch(crate::watch::Watch),
    /// Write a small file that says what a run was
    Certify(crate::certify::Certify),
    /// Check a run against its certificate
    Check(crate::certify::Check),
    /// Find where two runs part, the leaves that differ there, and the likely cause
    Explain(crate::explain::Explain),
    /// Run a program uninterrupted and killed in many ways: does it make a difference?
    Prove(crate::prove::Prove),
}

#[derive(Debug, Args)]
pub(crate) struct List {
    /// Run directory
    pub(crate) run: PathBuf,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// RUN or RUN@STEP
    pub(crate) checkpoint: String,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Log {
    /// Run directory
    pub(crate) run: PathBuf,
    /// Only these steps, both ends included: 10..20, 10.., ..20 or 10
    #[arg(long, value_name = "A..B", value_parser = parse_steps)]
    pub(crate) steps: Option<Steps>,
    /// Show every component, digests too
    #[arg(long)]
    pub(crate) components: bool,
    /// Answer in JSON, an object on each line
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Diff {
    /// What is expected: RUN or RUN@STEP
    pub(crate) expected: String,
    /// What was found: RUN, or RUN@STEP if the first has a step
    pub(crate) found: String,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// RUN for all of its checkpoints and its journal, RUN@STEP for one checkpoint
    pub(crate) checkpoint: String,
    /// Look at manifests, pack headers and lengths only; read no tensor
    #[arg(long)]
    pub(crate) quick: bool,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Export {
    /// RUN or RUN@STEP
    pub(crate) checkpoint: String,
    /// File to write, ending in .safetensors
    pub(crate) file: PathBuf,
    /// Only names that start so, such as objects/model/; written without it
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) prefix: String,
    /// Only this name, or a pattern with * and ?; may be repeated
    #[arg(long, value_name = "NAME")]
    pub(crate) only: Vec<String>,
    /// Replace FILE if it exists
    #[arg(long)]
    pub(crate) force: bool,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("rules").args(["last", "every", "best"]).multiple(true).required(true))]
#[command(after_help = "\
What any rule keeps stays, and so do pinned checkpoints and the newest.
Of a step's checkpoints (after it, its epoch's work, the run's end), which share their files, the
newest stands for all.")]
pub(crate) struct Prune {
    /// Run directory
    pub(crate) run: PathBuf,
    /// Keep the newest N steps
    #[arg(long, value_name = "N")]
    pub(crate) last: Option<usize>,
    /// Keep steps that are a multiple of M
    #[arg(long, value_name = "M")]
    pub(crate) every: Option<u64>,
    /// Keep the N best steps by a metric, such as loss:min:1
    #[arg(long, value_name = "METRIC:min|max:N", value_parser = parse_best)]
    pub(crate) best: Option<BestRule>,
    /// Show what would go and delete nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// A range of steps, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Steps {
    pub(crate) first: u64,
    pub(crate) last: u64,
}

fn parse_steps(text: &str) -> Result<Steps, String> {
    let number = |text: &str, default: u64| {
        if text.is_empty() {
            Ok(default)
        } else {
            text.parse().map_err(|_| format!("`{text}` is not a step"))
        }
    };
    let steps = match text.split_once("..") {
        Some((first, last)) => Steps {
            first: number(first, 0)?,
            last: number(last, u64::MAX)?,
        },
        None => {
            let step = text.parse().map_err(|_| format!("`{text}` is not a step"))?;
            Steps {
                first: step,
                last: step,
            }
        }
    };
    if steps.first > steps.last {
        return Err(format!("{} comes after {}", steps.first, steps.last));
    }
    Ok(steps)
}

/// Keep the best `count` by a metric.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BestRule {
    pub(crate) metric: String,
    pub(crate) lower_is_better: bool,
    pub(crate) count: usize,
}

fn parse_best(text: &str) -> Result<BestRule, String> {
    // From the right: a metric's own name may hold colons.
    let mut parts = text.rsplitn(3, ':');
    let (count, order, metric) = (parts.next(), parts.next(), parts.next());
    let (Some(count), Some(order), Some(metric)) = (count, order, metric) else {
        return Err("should be METRIC:min:N or METRIC:max:N".to_owned());
    };
    let count = count
        .parse()
        .map_err(|_| format!("`{count}` is not a number of checkpoints"))?;
    let lower_is_better = match order {
        "min" => true,
        "max" => false,
        _ => return Err(format!("`{order}` is neither min nor max")),
    };
    if metric.is_empty() || count == 0 {
        return Err("needs a metric's name and at least 1 checkpoint".to_owned());
    }
    Ok(BestRule {
        metric: metric.to_owned(),
        lower_is_better,
        count,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_of_the_arguments_holds_together() {
        use clap::CommandFactory;
        Arguments::command().debug_assert();
    }

    #[test]
    fn ranges_of_steps_include_both_ends_and_may_be_open() {
        assert_eq!(parse_steps("3..5"), Ok(Steps { first: 3, last: 5 }));
        assert_eq!(
            parse_steps("3.."),
            Ok(Steps {
                first: 3,
                last: u64::MAX
            })
        );
        assert_eq!(parse_steps("..5"), Ok(Steps { first: 0, last: 5 }));
        assert_eq!(parse_steps("4"), Ok(Steps { first: 4, last: 4 }));
        for wrong in ["", "a", "5..3", "1..x", "-1"] {
            assert!(parse_steps(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_best_rule_takes_a_metric_with_colons_in_its_name() {
        let rule = parse_best("val:loss:min:2").unwrap();
        assert_eq!(
            rule,
            BestRule {
                metric: "val:loss".into(),
                lower_is_better: true,
                count: 2
            }
        );
        for wrong in [
            "loss",
            "loss:min",
            "loss:up:1",
            "loss:min:0",
            ":max:1",
            "loss:min:x",
        ] {
            assert!(parse_best(wrong).is_err(), "{wrong}");
        }
    }
}
