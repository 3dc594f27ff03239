//! Where two records of one step part: the first operator that gave something else for the same inputs, or the input
//! that brought the difference in. A pure function of the lines that python/unbroken/torch/trace.py writes.
//!
//! Touches: nothing. Lines are taken one at a time, so that memory does not grow with the step.

use serde_json::{Value as Json, json};

/// Operators with other outputs that are kept until one of those outputs is used.
const MOST_SUSPECTS: usize = 64;

/// A line of the user's program.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Site {
    /// `file:line`.
    pub(crate) line: String,
    pub(crate) function: String,
    /// The line's text.
    pub(crate) text: String,
    /// Path of the innermost module, such as `model.layers.3`.
    pub(crate) module: String,
}

/// One argument of an operator, or one leaf of a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) path: String,
    /// Look and digest of a tensor, or a value; equal texts mean equal.
    pub(crate) text: String,
    /// Where it comes from: `#N.M` is output M of operator N; other texts are for people; empty is unknown.
    pub(crate) origin: String,
    /// Address modulo 64. Compared only to explain.
    pub(crate) alignment: u64,
}

/// One call of an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Operator {
    pub(crate) name: String,
    pub(crate) site: Site,
    /// The autograd node that called it, and where its forward was.
    pub(crate) backward: Option<(String, Option<Site>)>,
    pub(crate) inputs: Vec<Part>,
    pub(crate) outputs: Vec<Part>,
}

/// One line of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// What the step begins with, in causal order.
    Begin(Vec<Part>),
    Operator(Box<Operator>),
    /// What it left behind.
    End(Vec<Part>),
}

/// What two records say of each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The step came out the same. An operator's other output that nothing used is no difference.
    Same { operators: u64, unused: Option<Suspect> },
    /// The two executions did not begin alike.
    Begin {
        leaf: Part,
        found: String,
        others: usize,
    },
    /// An operator gave other outputs for equal inputs.
    Operator(Suspect),
    /// An input differs that no operator made.
    Input {
        number: u64,
        operator: Box<Operator>,
        part: Part,
        found: String,
    },
    /// The program took another way: other operators, or another number of them.
    Way {
        number: u64,
        expected: Option<Box<Operator>>,
        found: Option<Box<Operator>>,
    },
    /// No operator differs, and yet the state behind the step does.
    End { leaf: Part, found: String },
}

/// An operator with equal inputs and other outputs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Suspect {
    pub(crate) number: u64,
    pub(crate) operator: Box<Operator>,
    /// Index and path of each output that differs.
    pub(crate) outputs: Vec<(usize, String)>,
    /// Inputs whose memory is aligned differently: path, expected, found.
    pub(crate) alignments: Vec<(String, u64, u64)>,
}

/// Why a record cannot be compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Unreadable(pub(crate) String);

/// Reads one line.
pub(crate) fn parse(text: &str) -> Result<Line, Unreadable> {
    let wrong = || {
        Unreadable(format!(
            "not a line of a trace: {}",
            text.chars().take(60).collect::<String>()
        ))
    };
    let line: Json = serde_json::from_str(text).map_err(|_| wrong())?;
    let parts = |name: &str| parts(&line[name]).ok_or_else(wrong);
    match line["kind"].as_str() {
        Some("begin") => Ok(Line::Begin(parts("leaves")?)),
        Some("end") => Ok(Line::End(parts("leaves")?)),
        Some("operator") => Ok(Line::Operator(Box::new(Operator {
            name: line["name"].as_str().ok_or_else(wrong)?.to_owned(),
            site: site(&line["site"]).ok_or_else(wrong)?,
            backward: line["backward"]
                .as_str()
                .map(|node| (node.to_owned(), site(&line["forward"]))),
            inputs: parts("in")?,
            outputs: parts("out")?,
        }))),
        _ => Err(wrong()),
    }
}

fn site(json: &Json) -> Option<Site> {
    let text = |name: &str| json[name].as_str().map(str::to_owned);
    Some(Site {
        line: text("line")?,
        function: text("function")?,
        text: text("text")?,
        module: text("module")?,
    })
}

fn parts(json: &Json) -> Option<Vec<Part>> {
    let part = |entry: &Json| {
        let text = |index: usize| entry[index].as_str().map(str::to_owned);
        Some(Part {
            path: text(0)?,
            text: text(1)?,
            origin: text(2).unwrap_or_default(),
            alignment: entry[3].as_u64().unwrap_or(0),
        })
    };
    json.as_array()?.iter().map(part).collect()
}

/// Compares two records of one step.
///
/// # Errors
///
/// Where one of them is not whole.
pub(crate) fn compare(
    mut expected: impl Iterator<Item = Result<Line, Unreadable>>,
    mut found: impl Iterator<Item = Result<Line, Unreadable>>,
) -> Result<Outcome, Unreadable> {
    let mut suspects: Vec<Suspect> = Vec::new();
    let mut number = 0;
    loop {
        match (whole(expected.next())?, whole(found.next())?) {
            (Line::Begin(old), Line::Begin(new)) => {
                let mut differing = differing(&old, &new);
                if !differing.is_empty() {
                    let others = differing.len() - 1;
                    let (leaf, found) = differing.swap_remove(0);
                    return Ok(Outcome::Begin { leaf, found, others });
                }
            }
            (Line::Operator(old), Line::Operator(new)) if same_call(&old, &new) => {
                let inputs = differing(&old.inputs, &new.inputs);
                if !inputs.is_empty() {
                    return Ok(blame(number, old, inputs, suspects));
                }
                if let Some(suspect) = suspect(number, old, &new)
                    && suspects.len() < MOST_SUSPECTS
                {
                    suspects.push(suspect);
                }
                number += 1;
            }
            (Line::End(old), Line::End(new)) => {
                let leaf = differing(&old, &new).into_iter().next();
                let first = suspects.into_iter().next();
                return Ok(match (leaf, first) {
                    (None, unused) => Outcome::Same {
                        operators: number,
                        unused,
                    },
                    (Some(_), Some(suspect)) => Outcome::Operator(suspect),
                    (Some((leaf, found)), None) => Outcome::End { leaf, found },
                });
            }
            (old, new) => {
                return Ok(match suspects.into_iter().next() {
                    // What it gave may well have decided which way was taken.
                    Some(suspect) => Outcome::Operator(suspect),
                    None => Outcome::Way {
                        number,
                        expected: operator(old),
                        found: operator(new),
                    },
                });
            }
        }
    }
}

fn whole(line: Option<Result<Line, Unreadable>>) -> Result<Line, Unreadable> {
    line.unwrap_or_else(|| Err(Unreadable("the record ends before the step does".to_owned())))
}

fn operator(line: Line) -> Option<Box<Operator>> {
    match line {
        Line::Operator(operator) => Some(operator),
        Line::Begin(_) | Line::End(_) => None,
    }
}

fn same_call(old: &Operator, new: &Operator) -> bool {
    old.name == new.name && old.site.line == new.site.line && old.site.module == new.site.module
}

/// Parts that differ, with what was found; a part that only one side has differs from nothing.
fn differing(old: &[Part], new: &[Part]) -> Vec<(Part, String)> {
    let missing = |part: &Part, others: &[Part]| !others.iter().any(|other| other.path == part.path);
    let mut found = Vec::new();
    for (index, part) in old.iter().enumerate() {
        // Nearly always at the same place.
        let other = match new.get(index).filter(|other| other.path == part.path) {
            Some(other) => Some(other),
            None => new.iter().find(|other| other.path == part.path),
        };
        match other {
            Some(other) if other.text == part.text => {}
            Some(other) => found.push((part.clone(), other.text.clone())),
            None => found.push((part.clone(), "nothing".to_owned())),
        }
    }
    for part in new.iter().filter(|part| missing(part, old)) {
        let leaf = Part {
            text: "nothing".to_owned(),
            ..part.clone()
        };
        found.push((leaf, part.text.clone()));
    }
    found
}

fn suspect(number: u64, old: Box<Operator>, new: &Operator) -> Option<Suspect> {
    let outputs: Vec<(usize, String)> = differing(&old.outputs, &new.outputs)
        .into_iter()
        .map(|(part, _)| {
            (
                old.outputs
                    .iter()
                    .position(|other| other.path == part.path)
                    .unwrap_or(0),
                part.path,
            )
        })
        .collect();
    if outputs.is_empty() {
        return None;
    }
    let alignments = old.inputs.iter().zip(&new.inputs);
    let alignments = alignments.filter(|(old, new)| old.alignment != new.alignment);
    let alignments = alignments
        .map(|(old, new)| (old.path.clone(), old.alignment, new.alignment))
        .collect();
    Some(Suspect {
        number,
        operator: old,
        outputs,
        alignments,
    })
}

/// Says where differing inputs come from: an operator that was seen to differ, or from outside.
fn blame(
    number: u64,
    operator: Box<Operator>,
    mut inputs: Vec<(Part, String)>,
    mut suspects: Vec<Suspect>,
) -> Outcome {
    let made = |part: &Part, suspect: &Suspect| {
        let outputs = suspect.outputs.iter();
        outputs
            .clone()
            .any(|(output, _)| part.origin == format!("#{}.{output}", suspect.number))
    };
    let culprit = suspects
        .iter()
        .position(|suspect| inputs.iter().any(|(part, _)| made(part, suspect)));
    if let Some(index) = culprit {
        return Outcome::Operator(suspects.swap_remove(index));
    }
    let (part, found) = inputs.swap_remove(0);
    Outcome::Input {
        number,
        operator,
        part,
        found,
    }
}

impl Outcome {
    /// The outcome for programs.
    pub(crate) fn json(&self) -> Json {
        match self {
            Outcome::Same { operators, unused } => json!({
                "kind": "same",
                "operators": operators,
                "unused": unused.as_ref().map(suspect_json),
            }),
            Outcome::Begin { leaf, found, others } => json!({
                "kind": "begin", "leaf": leaf.path, "expected": leaf.text, "found": found, "others": others,
            }),
            Outcome::Operator(suspect) => {
                json!({ "kind": "operator", "operator": suspect_json(suspect) })
            }
            Outcome::Input {
                number,
                operator,
                part,
                found,
            } => json!({
                "kind": "input",
                "operator": operator_json(*number, operator),
                "input": part.path,
                "origin": part.origin,
                "expected": part.text,
                "found": found,
            }),
            Outcome::Way {
                number,
                expected,
                found,
            } => {
                let json =
                    |side: &Option<Box<Operator>>| side.as_ref().map(|side| operator_json(*number, side));
                json!({ "kind": "way", "expected": json(expected), "found": json(found) })
            }
            Outcome::End { leaf, found } => {
                json!({ "kind": "end", "leaf": leaf.path, "expected": leaf.text, "found": found })
            }
        }
    }

    /// The outcome for people.
    pub(crate) fn lines(&self) -> Vec<String> {
        match self {
            Outcome::Same { operators, unused } => {
                let mut lines = vec![format!(
                    "the same, in {operators} operators and the state behind them"
                )];
                if let Some(suspect) = unused {
                    let (number, name) = (suspect.number, &suspect.operator.name);
                    lines.push(format!(
                        "operator {number}, {name}, gave another output, which nothing used"
                    ));
                }
                lines
            }
            Outcome::Begin { leaf, found, others } => {
                let mut lines = vec![
                    format!("the two did not begin alike: `{}` differs", leaf.path),
                    format!("  {} and {found}", leaf.text),
                ];
                if *others > 0 {
                    lines.push(format!("  and so do {others} more"));
                }
                lines
            }
            Outcome::Operator(suspect) => suspect_lines(suspect),
            Outcome::Input {
                number,
                operator,
                part,
                found,
            } => {
                let mut lines = vec![format!(
                    "first difference: an input of operator {number}, {}, that no operator made",
                    operator.name
                )];
                lines.extend(place_lines(operator));
                lines.push(format!("  input `{}`: {} and {found}", part.path, part.text));
                lines.push(format!("  it is {}", origin_words(&part.origin)));
                lines
            }
            Outcome::Way {
                number,
                expected,
                found,
            } => {
                let mut lines = vec![format!("the program takes another way at operator {number}:")];
                for side in [expected, found] {
                    match side {
                        Some(operator) => {
                            lines.push(format!("  {}", operator.name));
                            lines.extend(place_lines(operator).iter().map(|text| format!("  {text}")));
                        }
                        None => lines.push("  the end of the step".to_owned()),
                    }
                }
                lines
            }
            Outcome::End { leaf, found } => vec![
                format!(
                    "no operator differs, and yet `{}` does behind the step",
                    leaf.path
                ),
                format!("  {} and {found}", leaf.text),
                "  it was written outside of torch's operators".to_owned(),
            ],
        }
    }
}

fn suspect_lines(suspect: &Suspect) -> Vec<String> {
    let mut lines = vec![format!(
        "first difference: operator {}, {}, gave different outputs for equal inputs",
        suspect.number, suspect.operator.name
    )];
    lines.extend(place_lines(&suspect.operator));
    for (index, path) in &suspect.outputs {
        let text = suspect
            .operator
            .outputs
            .get(*index)
            .map_or("", |part| part.text.as_str());
        // The digest says nothing to people.
        let look = text.rsplit_once(' ').map_or(text, |(look, _)| look);
        lines.push(format!("  output `{path}`: {look}"));
    }
    for (path, expected, found) in &suspect.alignments {
        lines.push(format!(
            "  input `{path}` lies {expected} and {found} bytes behind a multiple of 64"
        ));
    }
    let unwritten = suspect
        .operator
        .inputs
        .iter()
        .find(|part| part.origin == "uninitialised memory");
    if let Some(part) = unwritten {
        lines.push(format!(
            "  its `{}` was memory that nothing had been written to",
            part.path
        ));
    }
    lines
}

fn place_lines(operator: &Operator) -> Vec<String> {
    let mut lines = vec![format!("  {}", site_words(&operator.site))];
    if let Some((node, forward)) = &operator.backward {
        lines.push(format!("  in the backward, {node}"));
        if let Some(forward) = forward {
            lines.push(format!("  whose forward is {}", site_words(forward)));
        }
    }
    lines
}

fn site_words(site: &Site) -> String {
    let module = if site.module.is_empty() {
        String::new()
    } else {
        format!("module `{}`, ", site.module)
    };
    if site.line.is_empty() {
        return format!("{module}outside of the program's own code");
    }
    format!("{module}{} in {}: {}", site.line, site.function, site.text)
}

fn origin_words(origin: &str) -> String {
    if let Some((number, output)) = origin.strip_prefix('#').and_then(|text| text.split_once('.')) {
        return format!("output {output} of operator {number}, changed since outside of torch's operators");
    }
    match origin {
        "" => "made outside of torch's operators: by Python, numpy or other libraries".to_owned(),
        "uninitialised memory" => "memory of `torch.empty`, with what happened to lie there".to_owned(),
        words => words.to_owned(),
    }
}

fn suspect_json(suspect: &Suspect) -> Json {
    let mut json = operator_json(suspect.number, &suspect.operator);
    json["outputs"] = suspect.outputs.iter().map(|(_, path)| json!(path)).collect();
    json["alignments"] = json!(suspect.alignments);
    json
}

fn operator_json(number: u64, operator: &Operator) -> Json {
    json!({
        "number": number,
        "name": operator.name,
        "site": site_json(&operator.site),
        "backward": operator.backward.as_ref().map(|(node, _)| node),
        "forward": operator.backward.as_ref().and_then(|(_, forward)| forward.as_ref()).map(site_json),
    })
}

fn site_json(site: &Site) -> Json {
    json!({ "line": site.line, "function": site.function, "text": site.text, "module": site.module })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(path: &str, text: &str, origin: &str) -> Json {
        json!([path, text, origin, 0])
    }

    fn call(name: &str, inputs: &[Json], outputs: &[Json]) -> String {
        let site = json!({ "line": "train.py:7", "function": "main", "text": "net(x)", "module": "model.0" });
        json!({ "kind": "operator", "name": name, "site": site, "in": inputs, "out": outputs }).to_string()
    }

    fn edge(kind: &str, leaves: &[Json]) -> String {
        json!({ "kind": kind, "leaves": leaves }).to_string()
    }

    fn record(noise: &str, scratch: &str, end: &str) -> Vec<String> {
        vec![
            edge("begin", &[part("batch[0]", "b", "")]),
            call(
                "scratch",
                &[part("self", "b", "`batch[0]`")],
                &[part("result[0]", "s", ""), part("result[1]", scratch, "")],
            ),
            call(
                "noise",
                &[part("self", "s", "#0.0")],
                &[part("result", noise, "")],
            ),
            call(
                "mul",
                &[part("self", noise, "#1.0")],
                &[part("result", &format!("{noise} doubled"), "")],
            ),
            edge("end", &[part("objects/w", end, "")]),
        ]
    }

    fn outcome(expected: &[String], found: &[String]) -> Result<Outcome, Unreadable> {
        compare(
            expected.iter().map(|line| parse(line)),
            found.iter().map(|line| parse(line)),
        )
    }

    #[test]
    fn equal_records_are_the_same_whatever_unused_scratch_memory_holds() {
        let found = outcome(&record("n", "1", "w"), &record("n", "2", "w")).unwrap();
        let Outcome::Same {
            operators: 3,
            unused: Some(suspect),
        } = found
        else {
            panic!("{found:?}")
        };
        assert_eq!(
            (suspect.number, suspect.outputs),
            (0, vec![(1, "result[1]".to_owned())])
        );
    }

    #[test]
    fn the_operator_whose_other_output_is_used_is_named_not_an_earlier_one_without_consequence() {
        let found = outcome(&record("n", "1", "w"), &record("m", "2", "v")).unwrap();
        let Outcome::Operator(suspect) = found else {
            panic!("{found:?}")
        };
        assert_eq!((suspect.number, suspect.operator.name.as_str()), (1, "noise"));
    }

    #[test]
    fn a_value_of_the_program_that_differs_is_an_input_that_no_operator_made() {
        let side = |factor: &str| {
            vec![
                edge("begin", &[]),
                call(
                    "mul",
                    &[part("other", factor, "a value of the program")],
                    &[part("result", factor, "")],
                ),
                edge("end", &[]),
            ]
        };
        let found = outcome(&side("0.25"), &side("0.5")).unwrap();
        let Outcome::Input { part, found, .. } = found else {
            panic!("{found:?}")
        };
        assert_eq!(
            (part.path.as_str(), part.text.as_str(), found.as_str()),
            ("other", "0.25", "0.5")
        );
    }

    #[test]
    fn what_the_step_begins_with_comes_before_what_it_does() {
        let mut other = record("m", "1", "v");
        other[0] = edge("begin", &[part("batch[0]", "c", "")]);
        let found = outcome(&record("n", "1", "w"), &other).unwrap();
        assert!(
            matches!(found, Outcome::Begin { ref leaf, others: 0, .. } if leaf.path == "batch[0]"),
            "{found:?}"
        );
    }

    #[test]
    fn other_operators_are_another_way_and_a_state_that_no_operator_wrote_is_said_to_be_so() {
        let (mut longer, plain) = (record("n", "1", "w"), record("n", "1", "w"));
        longer.insert(4, call("extra", &[], &[]));
        let found = outcome(&plain, &longer).unwrap();
        assert!(
            matches!(
                found,
                Outcome::Way {
                    number: 3,
                    expected: None,
                    found: Some(_)
                }
            ),
            "{found:?}"
        );
        let found = outcome(&plain, &record("n", "1", "v")).unwrap();
        assert!(matches!(found, Outcome::End { .. }), "{found:?}");
    }

    #[test]
    fn a_record_that_ends_early_or_is_something_else_is_not_compared() {
        let whole = record("n", "1", "w");
        assert!(outcome(&whole, &whole[..3]).is_err());
        for wrong in [
            "",
            "{}",
            "[]",
            r#"{"kind":"operator"}"#,
            r#"{"kind":"begin","leaves":[1]}"#,
        ] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
