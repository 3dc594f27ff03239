//! `unbroken report`: one run, or several over each other, as one self-contained HTML page.
//!
//! Touches: run directories, read only, without their locks; the page's file.

mod chart;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use clap::Args;
use unbroken::Value;
use unbroken::format::journal::Component;
use unbroken::journal::{Event, field};
use unbroken::localise::change_words;

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::list::phase_words;
use crate::prove::judge::{self, Difference, Recorded, boundary_words};
use crate::words::{count, duration, size, value};
use chart::{Band, Chart, Curve, escape};

#[derive(Debug, Args)]
pub(crate) struct Report {
    /// Run directories; the first is what the others are compared with
    #[arg(required = true)]
    pub(crate) runs: Vec<PathBuf>,
    /// Page to write; it is replaced if it exists
    #[arg(short, long, value_name = "FILE", default_value = "report.html")]
    pub(crate) output: PathBuf,
}

pub(crate) fn run(command: &Report, streams: &mut Streams) -> Answer {
    let mut runs = Vec::new();
    for path in &command.runs {
        runs.push(Recorded::open(path, path.display().to_string(), None)?);
    }
    let mut differences = Vec::new();
    for other in runs.iter().skip(1) {
        let difference = match judge::compare_runs(&runs[0], other)? {
            Some(difference) => Some(judge::leaves_of(&difference, &runs[0], other)?),
            None => None,
        };
        differences.push(difference);
    }
    let verdict = Words::of(&runs, &differences);
    let page = page(&runs, &differences, &verdict)?;
    write(&command.output, &page)?;
    streams.say(format!("{}: {}", command.output.display(), verdict.headline))?;
    Ok(Verdict::Yes)
}

/// Writes the page beside its name first: a reader never sees half of it.
fn write(path: &Path, page: &str) -> Result<(), Failure> {
    let failed =
        |error: std::io::Error| Failure::new(format!("cannot write \"{}\": {error}", path.display()));
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}.tmp", std::process::id()));
    let temporary = PathBuf::from(temporary);
    fs::write(&temporary, page)
        .and_then(|()| fs::rename(&temporary, path))
        .map_err(failed)
}

/// The verdict that stands on top.
struct Words {
    good: bool,
    headline: String,
    more: Vec<String>,
}

impl Words {
    fn of(runs: &[Recorded], differences: &[Option<Difference>]) -> Words {
        let mut more = Vec::new();
        let (mut good, mut diverged) = (true, None);
        for run in runs {
            if let Some(event) = run.diverged() {
                good = false;
                diverged = diverged.or(Some(event.step));
                more.push(format!(
                    "{}: step {} came out differently when life {} executed it again",
                    run.name, event.step, event.life
                ));
            }
            for warning in run.flaws() {
                good = false;
                more.push(format!("{}: {warning}", run.name));
            }
            for (name, why) in &run.overview.rejected {
                good = false;
                more.push(format!("{}: checkpoint {name} is not whole: {why}", run.name));
            }
        }
        for (run, difference) in runs.iter().skip(1).zip(differences) {
            match difference {
                None => more.push(format!(
                    "{} and {} are the same, bit for bit",
                    runs[0].name, run.name
                )),
                Some(difference) => {
                    good = false;
                    more.extend(difference_words(&run.name, difference));
                }
            }
        }
        let headline = match (runs, good) {
            ([run], true) => verified_words(run),
            ([_], false) => match diverged {
                Some(step) => format!("Not exact: step {step} did not repeat itself"),
                None => "This run is not whole".to_owned(),
            },
            (_, true) => "The runs are the same, bit for bit".to_owned(),
            (_, false) => "The runs are not the same".to_owned(),
        };
        Words { good, headline, more }
    }
}

fn verified_words(run: &Recorded) -> String {
    let again = run.totals.again;
    let lives = run.story.lives.len();
    match (lives, again) {
        (0 | 1, _) => "One life, uninterrupted: nothing had to be proven".to_owned(),
        (_, 0) => format!("{lives} lives; no step had to be executed again"),
        (_, _) => format!(
            "{lives} lives; {} executed again, each identical",
            count(again, "boundary").replace("boundarys", "boundaries")
        ),
    }
}

fn difference_words(name: &str, difference: &Difference) -> Vec<String> {
    let mut lines = Vec::new();
    match &difference.parting {
        Some(parting) => lines.push(format!(
            "{name} differs first at {}, in {}: expected {}, found {}",
            boundary_words(parting.step, parting.phase),
            parting.component,
            parting.expected,
            parting.found
        )),
        None => lines.push(format!("{name}: {}", difference.words)),
    }
    for leaf in difference.restored.iter().chain(&difference.leaves).take(3) {
        lines.push(format!("{}: {}", leaf.path, change_words(&leaf.change)));
    }
    if let Some(cause) = &difference.cause {
        lines.push(format!("likely cause: {}", cause.words));
    }
    lines
}

/// Charts drawn, most interesting first; a page with fifty of them helps nobody.
const CHARTS: usize = 6;

fn page(runs: &[Recorded], differences: &[Option<Difference>], verdict: &Words) -> Result<String, Failure> {
    let mut out = String::new();
    let names: Vec<&str> = runs.iter().map(|run| run.name.as_str()).collect();
    let title = escape(&names.join(" and "));
    let _ = write!(
        out,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
         <title>{title}</title>\n<style>{STYLE}</style></head>\n<body><main>\n<p class=\"what\">{title}</p>\n"
    );
    let class = if verdict.good { "good" } else { "bad" };
    let mark = if verdict.good { "\u{2713}" } else { "\u{2715}" };
    let _ = writeln!(
        out,
        "<h1 class=\"{class}\"><span aria-hidden=\"true\">{mark}</span> {}</h1>",
        escape(&verdict.headline)
    );
    if !verdict.more.is_empty() {
        let items: String = verdict
            .more
            .iter()
            .map(|line| format!("<li>{}</li>", escape(line)))
            .collect();
        let _ = writeln!(out, "<ul class=\"verdict\">{items}</ul>");
    }
    facts(&mut out, runs);
    let parts = differences
        .iter()
        .flatten()
        .find_map(|difference| difference.parting.as_ref())
        .map(|at| at.step);
    let names = logged(&runs[0])?;
    let mut curves = Vec::new();
    for run in runs {
        curves.push(curves_of(run, &names)?);
    }
    for (index, name) in names.iter().enumerate() {
        let curves = curves.iter().map(|of_run| of_run[index].clone()).collect();
        charted(&mut out, runs, name, curves, parts);
    }
    for run in runs {
        if runs.len() > 1 {
            let _ = writeln!(out, "<h2>{}</h2>", escape(&run.name));
        }
        lives_table(&mut out, run);
        checkpoints_table(&mut out, run);
        environment_table(&mut out, run);
    }
    out.push_str("</main></body></html>\n");
    Ok(out)
}

fn facts(out: &mut String, runs: &[Recorded]) {
    out.push_str("<dl class=\"facts\">");
    for run in runs {
        if runs.len() > 1 {
            let _ = write!(out, "<div><dt>run</dt><dd>{}</dd></div>", escape(&run.name));
        }
        let new: u64 = run.saves().iter().filter_map(|save| save.new_bytes).sum();
        for (name, text) in [
            ("steps", run.totals.last.to_string()),
            ("lives", run.story.lives.len().to_string()),
            ("executed again", run.totals.again.to_string()),
            ("checkpoints", run.overview.checkpoints.len().to_string()),
            ("written for them", size(new)),
            ("seed", run.overview.seed.to_string()),
        ] {
            let _ = write!(out, "<div><dt>{name}</dt><dd>{}</dd></div>", escape(&text));
        }
        if runs.len() > 1 {
            out.push_str("</dl><dl class=\"facts\">");
        }
    }
    out.push_str("</dl>\n");
}

/// Names of the logged numbers that are drawn, `loss` first.
fn logged(run: &Recorded) -> Result<Vec<String>, Failure> {
    let mut names: Vec<String> = Vec::new();
    for boundary in run.boundaries().take(200) {
        for (name, component) in &boundary?.components {
            let number = matches!(component, Component::Float(_) | Component::Int(_));
            if number && (name.starts_with("log/") || name.starts_with("lr/")) && !names.contains(name) {
                names.push(name.clone());
            }
        }
    }
    names.sort_by_key(|name| (name != "log/loss", !name.starts_with("log/")));
    names.truncate(CHARTS);
    Ok(names)
}

/// A curve for each name, in one pass.
fn curves_of(run: &Recorded, names: &[String]) -> Result<Vec<Curve>, Failure> {
    let empty = Curve {
        name: run.name.clone(),
        points: Vec::new(),
    };
    let mut curves = vec![empty; names.len()];
    for boundary in run.boundaries() {
        let boundary = boundary?;
        for (name, component) in &boundary.components {
            let Some(index) = names.iter().position(|wanted| wanted == name) else {
                continue;
            };
            match component {
                Component::Float(bits) => curves[index].push(boundary.step, f64::from_bits(*bits)),
                Component::Int(number) => curves[index].push(boundary.step, *number as f64),
                _ => {}
            }
        }
    }
    Ok(curves)
}

/// Each life's stretch: from the checkpoint it started from to the last boundary that it recorded.
fn bands(run: &Recorded) -> Vec<Band> {
    let count = run.story.lives.len();
    let lives = run.story.lives.iter().enumerate();
    lives
        .map(|(index, header)| Band {
            life: header.life,
            from: header.step,
            to: run
                .totals
                .lives
                .get(&header.life)
                .map_or(header.step, |(last, _)| *last),
            cut: index + 1 < count,
        })
        .collect()
}

fn charted(out: &mut String, runs: &[Recorded], name: &str, curves: Vec<Curve>, parts: Option<u64>) {
    // Lives of several runs over each other would tell nothing: those of the last one, the one in question.
    let shown = &runs[runs.len() - 1];
    let chart = Chart {
        title: format!("{name} over the steps"),
        curves,
        bands: bands(shown),
        again: shown.totals.stretches.clone(),
        saves: shown.saves().iter().map(|save| (save.step, save.held)).collect(),
        parts,
    };
    let short = name.strip_prefix("log/").unwrap_or(name);
    let _ = writeln!(
        out,
        "<figure><figcaption><b>{}</b>{}</figcaption>",
        escape(short),
        legend(runs)
    );
    out.push_str(&chart.svg());
    out.push_str("</figure>\n");
}

fn legend(runs: &[Recorded]) -> String {
    let mut out = String::new();
    if runs.len() > 1 {
        for (index, run) in runs.iter().enumerate() {
            let _ = write!(
                out,
                " <span class=\"key key-{index}\"></span>{}",
                escape(&run.name)
            );
        }
    }
    let of_run = match runs {
        [.., _, last] => format!(" of {}", escape(&last.name)),
        _ => String::new(),
    };
    let _ = write!(
        out,
        " <span class=\"key key-life\"></span>a life{of_run} <span class=\"key key-kill\"></span>its end \
         <span class=\"key key-resume\"></span>where&nbsp;the&nbsp;next&nbsp;begins \
         <span class=\"key key-again\"></span>executed again <span class=\"key key-save\"></span>checkpoint \
         <span class=\"sign\">\u{25b3}</span>no&nbsp;longer&nbsp;there",
    );
    out
}

/// A longer table is folded: a page is read from its top.
const FOLDED_FROM: usize = 24;

fn table(out: &mut String, caption: &str, head: &[&str], rows: &[Vec<String>]) {
    if rows.is_empty() {
        return;
    }
    let cells = |tag: &str, cells: &mut dyn Iterator<Item = &str>| -> String {
        cells
            .map(|cell| format!("<{tag}>{}</{tag}>", escape(cell)))
            .collect()
    };
    let _ = writeln!(
        out,
        "<details class=\"wide\"{}><summary>{caption} ({})</summary><table><thead><tr>{}</tr></thead><tbody>",
        if rows.len() > FOLDED_FROM { "" } else { " open" },
        rows.len(),
        cells("th", &mut head.iter().copied())
    );
    for row in rows {
        let _ = writeln!(
            out,
            "<tr>{}</tr>",
            cells("td", &mut row.iter().map(String::as_str))
        );
    }
    out.push_str("</tbody></table></details>\n");
}

/// An RFC 3339 timestamp to the second, for people.
fn moment(time: &str) -> String {
    time.split('.')
        .next()
        .unwrap_or(time)
        .trim_end_matches('Z')
        .replace('T', " ")
}

fn lives_table(out: &mut String, run: &Recorded) {
    let bands = bands(run);
    let rows: Vec<Vec<String>> = run
        .story
        .lives
        .iter()
        .zip(&bands)
        .map(|(header, band)| {
            let again = run.totals.lives.get(&header.life).map_or(0, |(_, again)| *again);
            vec![
                header.life.to_string(),
                moment(&header.created),
                boundary_words(header.step, header.phase),
                band.to.to_string(),
                again.to_string(),
                ending_words(run, band),
            ]
        })
        .collect();
    table(
        out,
        "Lives",
        &["life", "started", "from", "to step", "executed again", "ended"],
        &rows,
    );
}

fn ending_words(run: &Recorded, band: &Band) -> String {
    let events = || run.story.events.iter().filter(|event| event.life == band.life);
    let field = |event: &Event, name: &str| match field(&event.fields, name) {
        Some(Value::Str(text)) => text.clone(),
        Some(other) => value(other),
        None => String::new(),
    };
    if let Some(event) = events().find(|event| event.kind == "diverged") {
        return format!("differed at step {} in {}", event.step, field(event, "component"));
    }
    if let Some(event) = events().find(|event| event.kind == "stopped") {
        return format!("stopped by {}", field(event, "reason"));
    }
    let finished = run.overview.checkpoints.iter().any(|checkpoint| {
        let info = checkpoint.info();
        info.phase == 2 && info.life == band.life
    });
    match (finished, band.cut) {
        (true, _) => "run complete".to_owned(),
        (false, true) => "killed, or ended by itself".to_owned(),
        (false, false) => "running, or ended".to_owned(),
    }
}

fn checkpoints_table(out: &mut String, run: &Recorded) {
    let words = |number: Option<u64>, words: fn(u64) -> String| number.map_or(String::new(), words);
    let rows: Vec<Vec<String>> = run
        .saves()
        .into_iter()
        .map(|save| {
            vec![
                save.step.to_string(),
                phase_words(save.phase).to_owned(),
                save.life.to_string(),
                moment(&save.created),
                words(save.size_bytes, size),
                words(save.new_bytes, size),
                words(save.durable_us, duration),
                words(save.commit_us, duration),
                match (save.held, save.pinned) {
                    (true, true) => "pinned",
                    (true, false) => "",
                    (false, _) => "no longer there",
                }
                .to_owned(),
                save.name,
            ]
        })
        .collect();
    let head = [
        "step",
        "boundary",
        "life",
        "created",
        "size",
        "new bytes",
        "time to durable",
        "of it writing",
        "",
        "name",
    ];
    table(out, "Checkpoints", &head, &rows);
}

/// What each life ran on, as far as its checkpoints say: one column a life, names that differ marked.
fn environment_table(out: &mut String, run: &Recorded) {
    let mut lives: BTreeMap<u32, BTreeMap<String, String>> = BTreeMap::new();
    for checkpoint in &run.overview.checkpoints {
        let info = checkpoint.info();
        let fields = info.environment.iter().chain(&info.identity);
        let words = fields.map(|(name, found)| (name.clone(), value(found)));
        lives.insert(info.life, words.collect());
    }
    let names: Vec<String> = lives
        .values()
        .flat_map(|fields| fields.keys().cloned())
        .collect::<std::collections::BTreeSet<_>>()
        .into_iter()
        .collect();
    let mut head = vec!["".to_owned()];
    head.extend(lives.keys().map(|life| format!("life {life}")));
    let rows: Vec<Vec<String>> = names
        .iter()
        .map(|name| {
            let found: Vec<&String> = lives.values().filter_map(|fields| fields.get(name)).collect();
            let same = found.windows(2).all(|pair| pair[0] == pair[1]) && found.len() == lives.len();
            let mut row = vec![if same {
                name.clone()
            } else {
                format!("{name} (changed)")
            }];
            row.extend(
                lives
                    .values()
                    .map(|fields| fields.get(name).cloned().unwrap_or_default()),
            );
            row
        })
        .collect();
    let head: Vec<&str> = head.iter().map(String::as_str).collect();
    table(out, "Environment and settings", &head, &rows);
}

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1c2330;--soft:#667085;--paper:#fbfbf9;--card:#fff;--rule:#e3e5ea;--good:#18794e;
--bad:#c4321f;--c0:#2456c9;--c1:#c2410c;--c2:#0f766e;--again:#18794e;--save:#667085;
--l0:#2456c9;--l1:#c2410c;--l2:#0f766e;--l3:#7c3aed;--l4:#a16207;--l5:#be185d;--band:.09}
@media (prefers-color-scheme:dark){:root{--ink:#e6e8ee;--soft:#98a1b3;--paper:#12151c;--card:#1a1f29;--rule:#2d3442;
--good:#4cc38a;--bad:#ff7a66;--c0:#82a8ff;--c1:#ffa36b;--c2:#5bd1c3;--again:#4cc38a;--save:#98a1b3;
--l0:#82a8ff;--l1:#ffa36b;--l2:#5bd1c3;--l3:#b69cff;--l4:#e5c264;--l5:#ff8fc0;--band:.13}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 64px}
.what{margin:0;color:var(--soft);font-family:ui-monospace,monospace;font-size:13px;overflow-wrap:anywhere}
h1{font-size:26px;line-height:1.25;margin:4px 0 12px}
h1.good span{color:var(--good)}h1.bad,h1.bad span{color:var(--bad)}
h2{font-size:17px;margin:36px 0 0;overflow-wrap:anywhere}
.verdict{margin:0 0 16px;padding:12px 16px 12px 32px;background:var(--card);border:1px solid var(--rule);
border-radius:8px;overflow-wrap:anywhere}
.facts{display:flex;flex-wrap:wrap;gap:10px 36px;margin:16px 0}
.facts dt{color:var(--soft);font-size:12px}.facts dd{margin:0;font-size:19px;font-variant-numeric:tabular-nums}
figure{margin:20px 0;padding:12px 14px 6px;background:var(--card);border:1px solid var(--rule);border-radius:8px}
figcaption{color:var(--soft);font-size:13px}figcaption b{color:var(--ink);font-size:15px;margin-right:14px}
svg{display:block;width:100%;height:auto}
.axis{fill:var(--soft);font-size:11px}.grid{stroke:var(--rule);stroke-width:1}
.curve{fill:none;stroke-width:1.6;stroke-linejoin:round}.curve-0{stroke:var(--c0)}
.curve-1{stroke:var(--c1);stroke-dasharray:6 3}.curve-2{stroke:var(--c2);stroke-dasharray:2 3}
.life{fill-opacity:var(--band)}.life-0{fill:var(--l0)}.life-1{fill:var(--l1)}.life-2{fill:var(--l2)}
.life-3{fill:var(--l3)}.life-4{fill:var(--l4)}.life-5{fill:var(--l5)}
.kill{stroke:var(--bad);stroke-width:1.2}.kill-mark{fill:var(--bad);font-size:12px}
.resume{stroke:var(--good);stroke-width:1;stroke-dasharray:3 3}
.again{fill:var(--again)}.save{fill:var(--save);stroke:var(--save)}.save.gone{fill:none}
.parts{stroke:var(--bad);stroke-width:2.2}.parts-mark{fill:var(--bad);font-size:12px;font-weight:600}
.key{display:inline-block;width:12px;height:12px;margin:0 5px 0 12px;vertical-align:-1px;border-radius:2px}
.key-0{background:var(--c0)}.key-1{background:var(--c1)}.key-2{background:var(--c2)}
.key-life{background:var(--l0);opacity:.3}.key-kill{background:var(--bad);width:3px}
.key-resume{width:0;border-left:3px dotted var(--good);border-radius:0}
.sign{margin:0 5px 0 12px;color:var(--save)}
.key-again{background:var(--again)}.key-save{background:var(--save);clip-path:polygon(50% 0,100% 100%,0 100%)}
.wide{overflow-x:auto;margin:24px 0}
table{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;min-width:100%}
summary{font-weight:600;font-size:15px;padding-bottom:6px;cursor:pointer}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--soft);font-weight:500}
";
