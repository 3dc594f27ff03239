//! A logged number over the steps as inline SVG: curves, lives as bands, kills and resumes, what was verified.
//!
//! Touches: nothing. Pure functions from numbers to text.

use std::fmt::Write;

/// One curve: (step, value), steps ascending.
#[derive(Clone, Debug, Default)]
pub(crate) struct Curve {
    pub(crate) name: String,
    pub(crate) points: Vec<(u64, f64)>,
}

impl Curve {
    /// Adds the next point. Of a long curve some are left out, and no extreme.
    pub(crate) fn push(&mut self, step: u64, value: f64) {
        if self.points.len() == 32 * MOST {
            self.points = thin(&self.points, 16 * MOST);
        }
        self.points.push((step, value));
    }
}

/// One life's stretch of steps, and how it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Band {
    pub(crate) life: u32,
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// Whether it ended before the run did.
    pub(crate) cut: bool,
}

/// What is drawn.
#[derive(Clone, Debug, Default)]
pub(crate) struct Chart {
    pub(crate) title: String,
    pub(crate) curves: Vec<Curve>,
    pub(crate) bands: Vec<Band>,
    /// Steps that more than one life executed: first and last of each stretch.
    pub(crate) again: Vec<(u64, u64)>,
    /// Steps of checkpoints, and whether each is still there.
    pub(crate) saves: Vec<(u64, bool)>,
    /// The step at which two runs, or two executions, part.
    pub(crate) parts: Option<u64>,
}

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 12.0;
const TOP: f64 = 22.0;
const BOTTOM: f64 = 58.0;
/// Points drawn of one curve; more do not fit on a screen.
const MOST: usize = 1200;

/// Text as HTML and SVG show it.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            character if character.is_control() => out.extend(character.escape_default()),
            character => out.push(character),
        }
    }
    out
}

/// Keeps at most `most` points and every extreme: of each bucket its lowest and its highest, in order.
fn thin(points: &[(u64, f64)], most: usize) -> Vec<(u64, f64)> {
    if points.len() <= most {
        return points.to_vec();
    }
    let size = points.len().div_ceil(most / 2);
    let mut out = Vec::with_capacity(most);
    for bucket in points.chunks(size) {
        let low = bucket
            .iter()
            .enumerate()
            .min_by(|a, b| a.1.1.total_cmp(&b.1.1))
            .map_or(0, |(at, _)| at);
        let high = bucket
            .iter()
            .enumerate()
            .max_by(|a, b| a.1.1.total_cmp(&b.1.1))
            .map_or(0, |(at, _)| at);
        out.push(bucket[low.min(high)]);
        if low != high {
            out.push(bucket[low.max(high)]);
        }
    }
    out
}

/// About `count` round numbers that cover a range.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let span = high - low;
    if !span.is_finite() || span <= 0.0 {
        return vec![low];
    }
    let rough = span / count as f64;
    let magnitude = 10f64.powf(rough.log10().floor());
    let unit = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|unit| rough <= unit * magnitude)
        .unwrap_or(10.0)
        * magnitude;
    let first = (low / unit).ceil() as i64;
    let last = (high / unit).floor() as i64;
    (first..=last).map(|at| at as f64 * unit).collect()
}

/// Round numbers with as many digits as tell them apart.
fn labelled(ticks: Vec<f64>) -> Vec<(f64, String)> {
    let unit = match ticks.as_slice() {
        [first, second, ..] => second - first,
        [only] => only.abs(),
        [] => 1.0,
    };
    // Of a unit of 0.05 the second digit behind the point counts.
    let place = |number: f64| (number.log10() + 1e-9).floor() as i32;
    let decimals = if unit > 0.0 { -place(unit) } else { 0 };
    let label = |value: f64| {
        if value.abs() < unit / 2.0 || value == 0.0 {
            return "0".to_owned();
        }
        if decimals > 5 || value.abs() >= 1e6 {
            let digits = usize::try_from(place(value.abs()) + decimals).unwrap_or(0);
            return format!("{value:.digits$e}");
        }
        format!("{value:.0$}", usize::try_from(decimals).unwrap_or(0))
    };
    ticks.into_iter().map(|value| (value, label(value))).collect()
}

impl Chart {
    /// The drawing.
    pub(crate) fn svg(&self) -> String {
        let finite = |(_, value): &&(u64, f64)| value.is_finite();
        let values: Vec<f64> = self
            .curves
            .iter()
            .flat_map(|curve| curve.points.iter().filter(finite).map(|point| point.1))
            .collect();
        let (mut low, mut high) = values
            .iter()
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
                (low.min(*v), high.max(*v))
            });
        if values.is_empty() {
            (low, high) = (0.0, 1.0);
        }
        if low == high {
            let room = if low == 0.0 { 0.5 } else { low.abs() / 10.0 };
            (low, high) = (low - room, high + room);
        }
        let steps = self
            .curves
            .iter()
            .flat_map(|curve| curve.points.iter().map(|point| point.0));
        let last = steps
            .chain(self.bands.iter().map(|band| band.to))
            .max()
            .unwrap_or(1)
            .max(1);
        let x = |step: f64| LEFT + step / last as f64 * (WIDTH - LEFT - RIGHT);
        let y = |value: f64| HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP);
        let mut out = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{0}\"><title>{0}</title>\n",
            escape(&self.title)
        );
        self.bands(&mut out, &x);
        for (value, label) in labelled(ticks(low, high, 5)) {
            let at = y(value);
            line(&mut out, "grid", (LEFT, at), (WIDTH - RIGHT, at));
            text(&mut out, "end", LEFT - 6.0, at + 4.0, &label);
        }
        for (step, label) in labelled(ticks(0.0, last as f64, 8)) {
            text(&mut out, "middle", x(step), HEIGHT - BOTTOM + 16.0, &label);
        }
        for (index, curve) in self.curves.iter().enumerate() {
            let points: Vec<(u64, f64)> = curve.points.iter().filter(finite).copied().collect();
            let mut path = String::new();
            for (step, value) in thin(&points, MOST) {
                let command = if path.is_empty() { 'M' } else { 'L' };
                let _ = write!(path, "{command}{:.1} {:.1}", x(step as f64), y(value));
            }
            let _ = writeln!(
                out,
                "<path class=\"curve curve-{index}\" d=\"{path}\"><title>{}</title></path>",
                escape(&curve.name)
            );
        }
        self.marks(&mut out, &x);
        out.push_str("</svg>\n");
        out
    }

    fn bands(&self, out: &mut String, x: &impl Fn(f64) -> f64) {
        let height = HEIGHT - BOTTOM - TOP;
        for band in &self.bands {
            let (left, right) = (x(band.from as f64), x(band.to as f64));
            let _ = writeln!(
                out,
                "<rect class=\"life life-{}\" x=\"{left:.1}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{height}\"><title>\
                 life {}: steps {} to {}</title></rect>",
                (band.life + 5) % 6,
                (right - left).max(1.0),
                band.life,
                band.from,
                band.to
            );
        }
    }

    /// What is drawn over the curve and below the axis: kills, resumes, what was executed again, saves, the parting.
    fn marks(&self, out: &mut String, x: &impl Fn(f64) -> f64) {
        let floor = HEIGHT - BOTTOM;
        for band in &self.bands {
            if band.cut {
                let at = x(band.to as f64);
                line(out, "kill", (at, TOP), (at, floor));
                text_class(out, "kill-mark", "middle", at, TOP - 6.0, "\u{2715}");
            }
            if band.from > 0 {
                let at = x(band.from as f64);
                line(out, "resume", (at, TOP), (at, floor));
            }
        }
        let strip = floor + 26.0;
        for (from, to) in &self.again {
            // A step is the way from the boundary before it to its own.
            let (left, right) = (x(from.saturating_sub(1) as f64), x(*to as f64));
            let _ = writeln!(
                out,
                "<rect class=\"again\" x=\"{left:.1}\" y=\"{strip}\" width=\"{:.1}\" height=\"8\"><title>steps {from} \
                 to {to} executed again</title></rect>",
                (right - left).max(1.5)
            );
        }
        for (step, held) in &self.saves {
            let at = x(*step as f64);
            let (class, words) = if *held {
                ("save", "")
            } else {
                ("save gone", ", no longer there")
            };
            let base = strip + 20.0;
            let _ = writeln!(
                out,
                "<path class=\"{class}\" d=\"M{:.1} {base}L{:.1} {base}L{at:.1} {:.1}Z\"><title>checkpoint at step \
                 {step}{words}</title></path>",
                at - 3.0,
                at + 3.0,
                base - 6.0
            );
        }
        if let Some(step) = self.parts {
            let at = x(step as f64);
            line(out, "parts", (at, TOP), (at, floor));
            let anchor = if at > WIDTH / 2.0 { "end" } else { "start" };
            let shift = if anchor == "end" { -5.0 } else { 5.0 };
            text_class(
                out,
                "parts-mark",
                anchor,
                at + shift,
                TOP + 12.0,
                &format!("they part at step {step}"),
            );
        }
    }
}

fn line(out: &mut String, class: &str, from: (f64, f64), to: (f64, f64)) {
    let _ = writeln!(
        out,
        "<line class=\"{class}\" x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\"/>",
        from.0, from.1, to.0, to.1
    );
}

fn text(out: &mut String, anchor: &str, x: f64, y: f64, words: &str) {
    text_class(out, "axis", anchor, x, y, words);
}

fn text_class(out: &mut String, class: &str, anchor: &str, x: f64, y: f64, words: &str) {
    let words = escape(words);
    let _ = writeln!(
        out,
        "<text class=\"{class}\" text-anchor=\"{anchor}\" x=\"{x:.1}\" y=\"{y:.1}\">{words}</text>"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_curve_is_thinned_and_keeps_its_extremes() {
        let mut points: Vec<(u64, f64)> = (0..10_000).map(|step| (step, 1.0)).collect();
        points[5003].1 = 99.0;
        points[7001].1 = -99.0;
        let thinned = thin(&points, 1000);
        assert!(thinned.len() <= 1000);
        assert!(thinned.contains(&(5003, 99.0)) && thinned.contains(&(7001, -99.0)));
        assert!(thinned.is_sorted_by_key(|point| point.0));
        assert_eq!(thin(&points[..5], 1000), points[..5]);
    }

    #[test]
    fn ticks_are_round_and_inside() {
        assert_eq!(ticks(0.0, 100.0, 5), [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(0.13, 0.42, 3), [0.2, 0.30000000000000004, 0.4]);
        assert_eq!(ticks(2.0, 2.0, 5), [2.0]);
    }

    #[test]
    fn labels_have_as_many_digits_as_tell_them_apart() {
        let labels = |low, high| -> Vec<String> {
            let all = labelled(ticks(low, high, 5));
            all.into_iter().map(|(_, label)| label).collect()
        };
        assert_eq!(labels(0.0, 0.11), ["0", "0.05", "0.10"]);
        assert_eq!(labels(-1.0, 1.0), ["-1.0", "-0.5", "0", "0.5", "1.0"]);
        assert_eq!(
            labels(0.0009, 0.0011),
            ["0.00090", "0.00095", "0.00100", "0.00105", "0.00110"]
        );
        assert_eq!(
            labels(1e-9, 3e-9),
            ["1.0e-9", "1.5e-9", "2.0e-9", "2.5e-9", "3.0e-9"]
        );
        assert_eq!(labels(0.0, 180.0), ["0", "50", "100", "150"]);
        assert_eq!(labels(0.0, 4e6), ["0", "1e6", "2e6", "3e6", "4e6"]);
        assert_eq!(labels(2.0, 2.0), ["2"]);
    }

    #[test]
    fn a_constant_is_drawn_at_its_value() {
        let chart = Chart {
            curves: vec![Curve {
                name: "lr".to_owned(),
                points: vec![(1, 0.001), (2, 0.001)],
            }],
            ..Chart::default()
        };
        assert!(chart.svg().contains(">0.00100</text>"), "{}", chart.svg());
    }

    #[test]
    fn names_from_a_stranger_are_escaped() {
        let chart = Chart {
            title: "<script>\u{1b}".into(),
            ..Chart::default()
        };
        let svg = chart.svg();
        assert!(svg.contains("&lt;script&gt;\\u{1b}") && !svg.contains("<script"));
    }

    #[test]
    fn what_is_not_a_number_leaves_no_trace_in_the_drawing() {
        let points = vec![(1, 1.0), (2, f64::NAN), (3, f64::INFINITY), (4, 2.0)];
        let svg = Chart {
            curves: vec![Curve {
                name: "loss".into(),
                points,
            }],
            ..Chart::default()
        }
        .svg();
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
