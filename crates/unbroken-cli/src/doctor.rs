//! `unbroken doctor`: what a directory's file system really does, whether there is room, and what the bits depend on.
//!
//! Touches: the directory, for a moment, in one of its own that is removed; environment variables. This program has no
//! torch: what a Python front knows of it comes as `--facts`, and a run's own settings from its newest checkpoint.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::{Value as Json, json};
use unbroken::Value;
use unbroken::run;
use unbroken::storage::probe::{self, FileSystem, Outcome};

use crate::answer::{Answer, Failure, Streams, Verdict};
use crate::words::{line, size, table, value};

#[derive(Debug, Args)]
#[command(after_help = "\
Exit code 0: the directory keeps what it is given, and has room. 1: it does not.
`python -m unbroken doctor DIR` looks at that Python's torch, too.")]
pub(crate) struct Doctor {
    /// A run directory, or where one is to be
    pub(crate) dir: PathBuf,
    /// Room that is needed, such as 1.5G; by default three times the newest checkpoint
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) need: Option<u64>,
    /// What a front knows of its own environment, a JSON object
    #[arg(long, hide = true, value_parser = parse_facts)]
    pub(crate) facts: Option<Facts>,
    /// Answer in JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Settings by name, in words; what is not set has no entry.
pub(crate) type Facts = BTreeMap<String, String>;

/// Variables that change bits, or decide how many threads there are.
const VARIABLES: [&str; 13] = [
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "MKL_DYNAMIC",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_DYNAMIC",
    "OMP_NUM_THREADS",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "OPENBLAS_NUM_THREADS",
    "PYTHONHASHSEED",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
];

pub(crate) fn run(command: &Doctor, streams: &mut Streams) -> Answer {
    let newest = newest_checkpoint(&command.dir)?;
    let disk = probe::probe(&command.dir).map_err(|error| {
        Failure::new(format!(
            "cannot try anything in `{}`: {error}",
            command.dir.display()
        ))
        .hint("give a directory that exists and can be written to: the run's, or the one it is to lie in")
    })?;
    let need = command.need.or_else(|| {
        newest
            .as_ref()
            .map(|recorded| recorded.size_bytes.saturating_mul(3))
    });
    let mut facts = surroundings();
    facts.extend(command.facts.clone().unwrap_or_default());
    let source = match &newest {
        Some(recorded) => {
            facts.extend(recorded.settings.clone());
            format!("recorded by checkpoint {}", recorded.name)
        }
        None if command.facts.is_some() => "of this Python as it starts; a script may change them".to_owned(),
        None => "of this shell; torch was not looked at".to_owned(),
    };
    let checks = checks(&disk);
    let advice = advise(&facts);
    let room =
        need.is_none_or(|need| disk.free_bytes >= need) && disk.free_files.is_none_or(|free| free >= 1000);
    let sound = room && disk.lasting && checks.iter().all(|check| check.verdict != Mark::No);
    if command.json {
        streams.json(&answer_json(&disk, need, &checks, &facts, &advice, sound))?;
    } else {
        tell_disk(&disk, need, &checks, streams)?;
        tell_facts(&source, &facts, &advice, streams)?;
    }
    let summary = match (sound, room) {
        (true, _) => "this directory keeps what it is given",
        (false, false) => "there is too little room",
        (false, true) => "this directory does not keep what it is given",
    };
    streams.note("summary", summary);
    Ok(Verdict::yes_if(sound))
}

/// What a run's newest checkpoint says of itself.
struct Recorded {
    name: String,
    size_bytes: u64,
    settings: Facts,
}

fn newest_checkpoint(dir: &Path) -> Result<Option<Recorded>, Failure> {
    if !dir.join("run.toml").is_file() {
        return Ok(None);
    }
    let checkpoints = run::read_run(dir)?.checkpoints;
    Ok(checkpoints.last().map(|checkpoint| {
        let info = checkpoint.info();
        let known = info.identity.iter().chain(&info.environment);
        Recorded {
            name: info.name.clone(),
            size_bytes: info.size_bytes,
            settings: known
                .filter(|(_, item)| *item != Value::None)
                .map(|(name, item)| (name.clone(), plain(item)))
                .collect(),
        }
    }))
}

/// A value without the quotes of a text.
fn plain(item: &Value) -> String {
    match item {
        Value::Str(text) => text.clone(),
        other => value(other),
    }
}

fn surroundings() -> Facts {
    let set = |name: &&str| std::env::var(name).ok().map(|text| (format!("env.{name}"), text));
    let mut facts: Facts = VARIABLES.iter().filter_map(set).collect();
    let cpus = std::thread::available_parallelism().map_or(1, |count| count.get());
    facts.insert("cpus".to_owned(), cpus.to_string());
    facts
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mark {
    Yes,
    /// Not there, and something else serves.
    Less,
    No,
}

impl Mark {
    fn word(self) -> &'static str {
        match self {
            Mark::Yes => "yes",
            Mark::Less => "less",
            Mark::No => "no",
        }
    }
}

/// One thing that was tried, and what it means.
#[derive(Clone, Debug)]
struct Check {
    what: &'static str,
    verdict: Mark,
    detail: String,
}

fn checks(disk: &FileSystem) -> Vec<Check> {
    let linked = disk.hard_links == Outcome::Works;
    let check = |what, outcome: &Outcome, refused: Mark, without: &str| {
        let (verdict, detail) = match outcome {
            Outcome::Works => (Mark::Yes, String::new()),
            Outcome::Refused(why) => (refused, format!("{why}: {without}")),
            Outcome::Broken(why) => (Mark::No, format!("it says so, but {why}")),
            Outcome::Untried(why) => (Mark::Less, format!("not tried: {why}")),
        };
        Check {
            what,
            verdict,
            detail,
        }
    };
    let (rename, instead) = match linked {
        true => (Mark::Less, "a link and a removal serve instead"),
        false => (Mark::No, "nothing serves instead, and nothing can be published"),
    };
    let mut all = vec![
        check("rename without replacing", &disk.rename_new, rename, instead),
        check(
            "sync of a directory",
            &disk.sync_dir,
            Mark::No,
            "a power cut may take back what was published",
        ),
        check(
            "lock that keeps others out",
            &disk.lock,
            Mark::No,
            "two trainings could write to one run",
        ),
        check("hard links", &disk.hard_links, Mark::Less, "`fork` has to --copy"),
        check(
            "writes past the page cache",
            &disk.direct,
            Mark::Less,
            "checkpoints are written through it, more slowly",
        ),
    ];
    let lasting = Check {
        what: "outlasts a power cut",
        verdict: if disk.lasting { Mark::Yes } else { Mark::No },
        detail: match disk.kind.as_str() {
            _ if !disk.lasting => "it is in memory".to_owned(),
            "overlay" => "as long as the container's layer: a volume lasts longer".to_owned(),
            "nfs" | "smb" | "9p" | "fuse" | "lustre" | "gpfs" | "beegfs" | "ceph" => {
                "as far as its server keeps what it says".to_owned()
            }
            _ => String::new(),
        },
    };
    all.insert(0, lasting);
    all
}

fn tell_disk(
    disk: &FileSystem,
    need: Option<u64>,
    checks: &[Check],
    streams: &mut Streams,
) -> Result<(), Failure> {
    streams.say(format!("{} ({})", disk.path.display(), disk.kind))?;
    let mut rows: Vec<Vec<String>> = checks
        .iter()
        .map(|check| {
            let word = format!("  {}", check.verdict.word());
            vec![word, check.what.to_owned(), line(&check.detail)]
        })
        .collect();
    if let Some(time) = disk.commit {
        rows.push(measured(
            format!("{:.1} ms", milliseconds(time)),
            "one commit of a small file",
        ));
    }
    if let Some(rate) = disk.bytes_per_s {
        rows.push(measured(
            format!("{}/s", size(rate)),
            "one large file, written and synced",
        ));
    }
    let room = match need {
        Some(need) => format!("free; {} needed", size(need)),
        None => "free".to_owned(),
    };
    rows.push(measured(size(disk.free_bytes), &room));
    if let Some(files) = disk.free_files.filter(|files| *files < 1000) {
        rows.push(measured(files.to_string(), "files can still be made"));
    }
    streams.print(&table(&rows))
}

fn measured(number: String, what: &str) -> Vec<String> {
    vec![format!("  {number}"), what.to_owned(), String::new()]
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn tell_facts(source: &str, facts: &Facts, advice: &[Advice], streams: &mut Streams) -> Result<(), Failure> {
    streams.say(format!("\nwhat the bits depend on, {source}"))?;
    let shown = facts.iter().filter(|(name, _)| is_setting(name));
    let rows: Vec<Vec<String>> = shown
        .map(|(name, text)| vec![format!("  {}", line(name)), line(text)])
        .collect();
    streams.print(&table(&rows))?;
    if !advice.is_empty() {
        streams.say("\nadvice")?;
    }
    for Advice { name, text } in advice {
        streams.say(format!("  {name}: {text}"))?;
    }
    Ok(())
}

/// Whether a recorded name is one of the surroundings', not of the model's or the data's.
fn is_setting(name: &str) -> bool {
    const STARTS: [&str; 9] = [
        "env.",
        "torch",
        "threads.",
        "cuda",
        "cudnn.",
        "cpu",
        "python",
        "world_size",
        "platform",
    ];
    STARTS.iter().any(|start| name.starts_with(start))
}

/// What could be done about one setting.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Advice {
    name: &'static str,
    text: String,
}

/// Judges settings; says nothing of those that are as they should be, or that nobody knows.
fn advise(facts: &Facts) -> Vec<Advice> {
    let get = |name: &str| facts.get(name).map(String::as_str);
    let number = |name: &str| get(name).and_then(|text| text.parse::<u64>().ok());
    let mut all = Vec::new();
    let mut say = |name: &'static str, text: &str| {
        all.push(Advice {
            name,
            text: text.to_owned(),
        });
    };
    let cuda = number("cuda.devices").is_some_and(|devices| devices > 0);

    match (number("threads.intra_op"), number("cpus")) {
        (Some(threads), Some(cpus)) if threads > cpus => say(
            "threads.intra_op",
            &format!("{threads} threads on the {cpus} CPUs that this process may use are slower than {cpus}"),
        ),
        _ => {}
    }
    if get("env.OMP_NUM_THREADS").is_none() && number("threads.intra_op") != Some(1) {
        say(
            "OMP_NUM_THREADS",
            "not set: the number of threads is the machine's, and sums come out differently with another number; set \
             it, or call torch.set_num_threads",
        );
    }
    for name in ["env.OMP_DYNAMIC", "env.MKL_DYNAMIC"] {
        if get(name).is_some_and(|text| text.eq_ignore_ascii_case("true") || text == "1") {
            let name = if name.contains("OMP") {
                "OMP_DYNAMIC"
            } else {
                "MKL_DYNAMIC"
            };
            say(
                name,
                "the number of threads may change while the program runs: set it to FALSE",
            );
        }
    }
    if get("env.PYTHONHASHSEED").is_none_or(|text| text == "random") {
        say(
            "PYTHONHASHSEED",
            "not set: sets of text have another order in every process; set it to 0 if such an order reaches the data",
        );
    }
    if [
        "env.MKL_CBWR",
        "env.ONEDNN_MAX_CPU_ISA",
        "env.ATEN_CPU_CAPABILITY",
    ]
    .iter()
    .all(|name| get(name).is_none())
    {
        say(
            "MKL_CBWR, ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY",
            "not set: each CPU chooses its own kernels, so resume on the same type of CPU, or set all three to what the \
             oldest of them can do",
        );
    }
    if get("env.ONEDNN_DEFAULT_FPMATH_MODE").is_some_and(|mode| !mode.eq_ignore_ascii_case("strict")) {
        say(
            "ONEDNN_DEFAULT_FPMATH_MODE",
            "float32 products are computed in fewer bits where the CPU can: exact on the same CPU only",
        );
    }
    if get("torch.deterministic_algorithms") == Some("False") {
        say(
            "torch.use_deterministic_algorithms",
            "off: an operation without a deterministic form runs all the same; turned on, torch names it",
        );
    }
    if get("torch.float32_matmul_precision").is_some_and(|precision| precision != "highest") {
        say(
            "torch.float32_matmul_precision",
            "not `highest`: which kernel computes a product depends on the device",
        );
    }
    let workspace = get("env.CUBLAS_WORKSPACE_CONFIG");
    if cuda && !matches!(workspace, Some(":4096:8" | ":16:8")) {
        say(
            "CUBLAS_WORKSPACE_CONFIG",
            "neither :4096:8 nor :16:8: products on CUDA may differ from run to run",
        );
    }
    if get("cudnn.benchmark") == Some("True") {
        say(
            "torch.backends.cudnn.benchmark",
            "on: convolutions choose their kernel by time, which may choose another one next time",
        );
    }
    if get("cudnn.deterministic") == Some("False") {
        say(
            "torch.backends.cudnn.deterministic",
            "off: convolutions may use kernels that differ from run to run",
        );
    }
    let tf32 = ["cuda.matmul.allow_tf32", "cudnn.allow_tf32"];
    let overridden = ["env.NVIDIA_TF32_OVERRIDE", "env.TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"];
    if tf32.iter().any(|name| get(name) == Some("True")) || overridden.iter().any(|name| get(name).is_some())
    {
        say(
            "TF32",
            "allowed or overridden: products have 10 bits where the GPU can, so resume on the same type of GPU",
        );
    }
    all
}

fn answer_json(
    disk: &FileSystem,
    need: Option<u64>,
    checks: &[Check],
    facts: &Facts,
    advice: &[Advice],
    sound: bool,
) -> Json {
    let checks: Vec<Json> = checks
        .iter()
        .map(|check| json!({ "what": check.what, "verdict": check.verdict.word(), "detail": check.detail }))
        .collect();
    let advice: Vec<Json> = advice
        .iter()
        .map(|advice| json!({ "name": advice.name, "text": advice.text }))
        .collect();
    let settings: BTreeMap<&String, &String> = facts.iter().filter(|(name, _)| is_setting(name)).collect();
    json!({
        "sound": sound,
        "path": disk.path.display().to_string(),
        "file_system": disk.kind,
        "checks": checks,
        "commit_ms": disk.commit.map(milliseconds),
        "write_bytes_per_s": disk.bytes_per_s,
        "free_bytes": disk.free_bytes,
        "free_files": disk.free_files,
        "need_bytes": need,
        "settings": settings,
        "advice": advice,
    })
}

/// A size with a binary unit: `500M`, `1.5G`, `62.2 GiB`, or bytes.
fn parse_size(text: &str) -> Result<u64, String> {
    let wrong = || format!("`{text}` is no size such as 40G or 1.5G");
    let digits_end = text.find(|c: char| !c.is_ascii_digit() && c != '.');
    let (number, unit) = text.split_at(digits_end.unwrap_or(text.len()));
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" if !number.contains('.') => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(factor).ok_or_else(wrong);
    }
    let bytes = number.parse::<f64>().map_err(|_| wrong())? * factor as f64;
    if bytes >= u64::MAX as f64 {
        return Err(wrong());
    }
    Ok(bytes.ceil() as u64)
}

fn parse_facts(text: &str) -> Result<Facts, String> {
    let json: Json = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let object = json.as_object().ok_or("not an object")?;
    let words = |item: &Json| match item {
        Json::Null => None,
        Json::Bool(flag) => Some(if *flag { "True" } else { "False" }.to_owned()),
        Json::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    };
    Ok(object
        .iter()
        .filter_map(|(name, item)| Some((name.clone(), words(item)?)))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(pairs: &[(&str, &str)]) -> Facts {
        let owned = |(name, text): &(&str, &str)| ((*name).to_owned(), (*text).to_owned());
        pairs.iter().map(owned).collect()
    }

    fn names(pairs: &[(&str, &str)]) -> Vec<&'static str> {
        advise(&facts(pairs)).iter().map(|advice| advice.name).collect()
    }

    const SETTLED: [(&str, &str); 5] = [
        ("env.OMP_NUM_THREADS", "4"),
        ("env.PYTHONHASHSEED", "0"),
        ("env.MKL_CBWR", "AVX2"),
        ("cpus", "8"),
        ("torch.deterministic_algorithms", "True"),
    ];

    #[test]
    fn settled_surroundings_get_no_advice() {
        assert_eq!(names(&SETTLED), [] as [&str; 0]);
    }

    #[test]
    fn each_source_of_other_bits_is_named() {
        let with = |more: &[(&str, &str)]| names(&[&SETTLED, more].concat());
        assert_eq!(with(&[("env.OMP_DYNAMIC", "TRUE")]), ["OMP_DYNAMIC"]);
        assert_eq!(with(&[("threads.intra_op", "16")]), ["threads.intra_op"]);
        assert_eq!(with(&[("cuda.devices", "1")]), ["CUBLAS_WORKSPACE_CONFIG"]);
        assert_eq!(
            with(&[("cuda.devices", "1"), ("env.CUBLAS_WORKSPACE_CONFIG", ":4096:8")]),
            [] as [&str; 0]
        );
        assert_eq!(with(&[("cudnn.allow_tf32", "True")]), ["TF32"]);
        assert_eq!(
            with(&[("cudnn.benchmark", "True")]),
            ["torch.backends.cudnn.benchmark"]
        );
        assert_eq!(
            names(&[]),
            [
                "OMP_NUM_THREADS",
                "PYTHONHASHSEED",
                "MKL_CBWR, ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY"
            ]
        );
    }

    #[test]
    fn what_cannot_be_published_safely_is_a_no_and_what_has_a_substitute_is_not() {
        let refused = || Outcome::Refused("not here".to_owned());
        let disk = FileSystem {
            path: "runs".into(),
            kind: "fuse".to_owned(),
            lasting: true,
            free_bytes: 0,
            free_files: None,
            rename_new: refused(),
            hard_links: Outcome::Works,
            sync_dir: Outcome::Works,
            lock: Outcome::Works,
            direct: refused(),
            commit: None,
            bytes_per_s: None,
        };
        let noes = |disk: &FileSystem| -> Vec<&str> {
            let checks = checks(disk);
            let no = checks.iter().filter(|check| check.verdict == Mark::No);
            no.map(|check| check.what).collect()
        };
        assert_eq!(noes(&disk), [] as [&str; 0]);
        let without_links = FileSystem {
            hard_links: refused(),
            ..disk.clone()
        };
        assert_eq!(noes(&without_links), ["rename without replacing"]);
        let lying = FileSystem {
            lock: Outcome::Broken("two holders at once".to_owned()),
            sync_dir: refused(),
            lasting: false,
            ..disk
        };
        let three = [
            "outlasts a power cut",
            "sync of a directory",
            "lock that keeps others out",
        ];
        assert_eq!(noes(&lying), three);
    }

    #[test]
    fn sizes_are_read_as_they_are_printed_with_decimals() {
        assert_eq!(parse_size("1.5G"), Ok(3 << 29));
        assert_eq!(parse_size("62.2 GiB"), Ok(66_786_741_453));
        for same in ["40G", "40g", "40GiB", "40960M", "42949672960", "42949672960 B"] {
            assert_eq!(parse_size(same), Ok(40 << 30), "{same}");
        }
        let wrong = [
            "",
            "G",
            ".",
            "1.5",
            "1.2.3G",
            "-1G",
            "1e3",
            "1GB",
            "ib",
            "17000000T",
            "20000000000000000000",
        ];
        for text in wrong {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
