//! Plots as SVG inside a page: no script, and colours by the classes of the page's sheet. Names are the program's own words.

use std::fmt::Write as _;
use std::iter::successors;

use crate::share::Share;

/// The drawing of a curve, in its own units; a page scales it.
const SIZE: [f64; 2] = [400.0, 190.0];
/// Its margins: left, right, top, bottom.
const MARGINS: [f64; 4] = [46.0, 14.0, 10.0, 24.0];
/// Points from which a moving mean is drawn.
const MANY: usize = 40;
/// The moving mean is over such a part of the points, where a curve does not say another.
const PARTS: usize = 12;
/// Places of a curve that say what they are under a pointer, at most.
const MOST_TITLES: usize = 100;
/// What is further from zero is drawn there.
const FURTHEST: f64 = 1e12;

/// How numbers are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unit {
    /// As they are.
    Plain,
    /// In percent.
    Share,
}

/// A figure over the steps of a run.
#[derive(Debug)]
pub(super) struct Curve<'a> {
    pub(super) name: &'a str,
    /// Its unit in words.
    pub(super) about: &'a str,
    unit: Unit,
    /// Each step with its figure, in order.
    points: Vec<(u64, Option<f64>)>,
    /// The moving mean is over such a part of its points.
    pub(super) parts: usize,
    /// What the scale holds, whether points are there or not.
    pub(super) holds: [f64; 2],
    /// Levels to compare with: the class each is drawn in, and what it is.
    pub(super) levels: Vec<(f64, &'a str, String)>,
}

/// A point that is one: its place in the list, its step and its figure.
type Found = (usize, f64, f64);

impl<'a> Curve<'a> {
    pub(super) fn new(name: &'a str, about: &'a str, unit: Unit, points: Vec<(u64, Option<f64>)>) -> Self {
        Self { name, about, unit, points, parts: PARTS, holds: [0.0; 2], levels: Vec::new() }
    }

    fn found(&self) -> Vec<Found> {
        let finite = |value: &f64| value.is_finite();
        let found = self.points.iter().enumerate();
        found
            .filter_map(|(at, (step, value))| Some((at, *step as f64, value.filter(finite)?.clamp(-FURTHEST, FURTHEST))))
            .collect()
    }

    /// Points of its moving mean; 1 where there are few points, and each stands for itself.
    pub(super) fn window(&self) -> usize {
        let count = self.found().len();
        if count < MANY { 1 } else { count.div_ceil(self.parts.max(1)) | 1 }
    }

    /// The drawing; `None` where there is no point.
    pub(super) fn draw(&self) -> Option<String> {
        let found = self.found();
        let (first, last) = (found.first()?, found.last()?);
        let values = || found.iter().map(|point| point.2);
        let [from, to] = [values().fold(f64::INFINITY, f64::min), values().fold(f64::NEG_INFINITY, f64::max)];
        let held =
            self.holds.iter().copied().chain(self.levels.iter().map(|(level, ..)| *level)).filter(|value| value.abs() < FURTHEST);
        let (low, high) = held.fold((from.min(0.0), to.max(0.0)), |(low, high), value| (low.min(value), high.max(value)));
        let steps =
            if last.1 > first.1 { Axis::within(first.1, last.1, 1.0) } else { Axis::within(first.1 - 1.0, first.1 + 1.0, 1.0) };
        let frame = Frame { x: steps, y: Axis::around(low, high) };
        let shown = |value| number(value, self.unit);
        let label = format!(
            "{} over steps: {} at step {}, {} at step {}; between {} and {}",
            self.name,
            shown(first.2),
            first.1,
            shown(last.2),
            last.1,
            shown(from),
            shown(to)
        );
        let [width, height] = SIZE;
        let mut svg = format!("<svg class=\"curve\" viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{label}\">");
        frame.draw_grid(&mut svg, self.unit);
        self.draw_points(&mut svg, &frame, &found);
        svg.push_str("</svg>");
        Some(svg)
    }

    fn draw_points(&self, svg: &mut String, frame: &Frame, found: &[Found]) {
        let window = self.window();
        let line = moving_mean(found, window);
        let class = if window > 1 { "faint" } else { "dots" };
        let mut dots = String::new();
        for (_, step, value) in found {
            let _ = write!(dots, "M{:.1} {:.1}h.01", frame.x_of(*step), frame.y_of(*value));
        }
        let _ = write!(svg, "<path class=\"{class}\" d=\"{dots}\"/>");
        for (level, class, _) in self.levels.iter().filter(|(level, ..)| level.is_finite()) {
            frame.draw_level(svg, *level, class);
        }
        svg.push_str("<path class=\"line\" d=\"");
        let mut before: Option<usize> = None;
        for (at, step, value) in &line {
            let joined = before.is_some_and(|before| at - before <= window.div_ceil(2));
            let _ = write!(svg, "{}{:.1} {:.1}", if joined { 'L' } else { 'M' }, frame.x_of(*step), frame.y_of(*value));
            before = Some(*at);
        }
        svg.push_str("\"/>");
        self.draw_titles(svg, frame, found, &line);
    }

    /// Strips that nobody sees, as high as the plot: a pointer need not meet a point to be told what it is.
    fn draw_titles(&self, svg: &mut String, frame: &Frame, found: &[Found], line: &[Found]) {
        let every = found.len().div_ceil(MOST_TITLES).max(1);
        let [left, right, top, bottom] = frame_edges();
        let strip = (right - left) / (found.len().div_ceil(every) as f64);
        for ((_, step, value), (_, _, mean)) in found.iter().zip(line).step_by(every) {
            let mut title = format!("step {step}: {}", number(*value, self.unit));
            if self.window() > 1 {
                let _ = write!(title, ", around it {}", number(*mean, self.unit));
            }
            let x = frame.x_of(*step) - strip / 2.0;
            let _ = write!(
                svg,
                "<rect class=\"strip\" x=\"{x:.1}\" y=\"{top}\" width=\"{strip:.1}\" height=\"{}\"><title>{title}</title></rect>",
                bottom - top
            );
        }
    }
}

/// The mean of each point and its neighbours: fewer of them at the ends.
fn moving_mean(found: &[Found], window: usize) -> Vec<Found> {
    let reach = window / 2;
    let mean = |(place, point): (usize, &Found)| {
        let neighbours = found.get(place.saturating_sub(reach)..(place + reach + 1).min(found.len())).unwrap_or_default();
        let sum: f64 = neighbours.iter().map(|point| point.2).sum();
        (point.0, point.1, sum / neighbours.len().max(1) as f64)
    };
    found.iter().enumerate().map(mean).collect()
}

/// A scale with its ticks, which are round.
#[derive(Debug)]
struct Axis {
    from: f64,
    to: f64,
    tick: f64,
}

impl Axis {
    /// From one end to the other.
    fn within(from: f64, to: f64, least_tick: f64) -> Self {
        Self { from, to, tick: round_up((to - from) / 5.0).max(least_tick) }
    }

    /// From one tick to another.
    fn around(low: f64, high: f64) -> Self {
        let (low, high) = if high - low < 1e-12 { (0.0, 1.0) } else { (low, high) };
        let tick = round_up((high - low) / 5.0);
        let out = |end: f64| (end.abs() / tick - 1e-9).ceil() * tick * end.signum();
        Self { from: out(low), to: out(high), tick }
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        let (tick, last) = (self.tick, self.to / self.tick + 1e-6);
        let multiples = successors(Some((self.from / tick - 1e-6).ceil()), |at| Some(at + 1.0));
        // No tick is at minus zero.
        multiples.take_while(move |at| *at <= last).take(12).map(move |at| at * tick + 0.0)
    }

    /// Where between its ends, in 0..1.
    fn place(&self, value: f64) -> f64 {
        ((value - self.from) / (self.to - self.from)).clamp(0.0, 1.0)
    }
}

/// The next of 1, 2 and 5 by a power of ten.
fn round_up(value: f64) -> f64 {
    let power = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0].map(|digit| digit * power).into_iter().find(|round| *round >= value * (1.0 - 1e-9)).unwrap_or(10.0 * power)
}

/// The two axes of a curve.
#[derive(Debug)]
struct Frame {
    x: Axis,
    y: Axis,
}

/// Left, right, top and bottom of what is inside the axes.
const fn frame_edges() -> [f64; 4] {
    let ([width, height], [left, right, top, bottom]) = (SIZE, MARGINS);
    [left, width - right, top, height - bottom]
}

impl Frame {
    fn x_of(&self, step: f64) -> f64 {
        let [left, right, ..] = frame_edges();
        left + (right - left) * self.x.place(step)
    }

    fn y_of(&self, value: f64) -> f64 {
        let [.., top, bottom] = frame_edges();
        bottom - (bottom - top) * self.y.place(value)
    }

    fn draw_grid(&self, svg: &mut String, unit: Unit) {
        let [left, right, _, bottom] = frame_edges();
        for value in self.y.ticks() {
            let (y, label) = (self.y_of(value), tick_label(value, self.y.tick, unit));
            let class = if value == 0.0 { "zero" } else { "grid" };
            let _ = write!(
                svg,
                "<path class=\"{class}\" d=\"M{left} {y:.1}H{right}\"/><text class=\"end\" x=\"{}\" y=\"{:.1}\">{label}</text>",
                left - 7.0,
                y + 4.0
            );
        }
        let below = bottom + 17.0;
        let _ = write!(svg, "<text class=\"end\" x=\"{}\" y=\"{below}\">step</text>", left - 7.0);
        for step in self.x.ticks().filter(|step| *step >= 0.0) {
            let x = self.x_of(step);
            let _ = write!(
                svg,
                "<path class=\"zero\" d=\"M{x:.1} {bottom}v4\"/><text class=\"middle\" x=\"{x:.1}\" y=\"{below}\">{}</text>",
                tick_label(step, self.x.tick, Unit::Plain)
            );
        }
    }

    fn draw_level(&self, svg: &mut String, level: f64, class: &str) {
        let ([left, right, ..], y) = (frame_edges(), self.y_of(level));
        let _ = write!(svg, "<path class=\"{class}\" d=\"M{left} {y:.1}H{right}\"/>");
    }
}

/// A tick in as many digits as its axis needs.
fn tick_label(value: f64, tick: f64, unit: Unit) -> String {
    let (value, tick, sign) = match unit {
        Unit::Plain => (value, tick, ""),
        Unit::Share => (100.0 * value, 100.0 * tick, "\u{a0}%"),
    };
    let is_whole = |scaled: f64| (scaled - scaled.round()).abs() < 1e-6 * scaled;
    match successors(Some(tick), |tick| Some(10.0 * tick)).take(5).position(is_whole) {
        Some(digits) if value.abs() < 1e6 => signed(&format!("{value:.digits$}{sign}")),
        _ => signed(&format!("{value:.0e}{sign}")),
    }
}

/// A number as a person reads it.
pub(super) fn number(value: f64, unit: Unit) -> String {
    let digits = |size: f64| match size {
        ..1.0 => 3,
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    let size = value.abs();
    match unit {
        Unit::Share => percent(value),
        Unit::Plain if size == 0.0 => "0".into(),
        Unit::Plain if !(1e-3..1e6).contains(&size) => signed(&format!("{value:.1e}")),
        Unit::Plain => signed(&format!("{value:.*}", digits(size))),
    }
}

/// A share in percent, to a tenth.
pub(super) fn percent(share: f64) -> String {
    format!("{}\u{a0}%", tenths(100.0 * share))
}

/// A number to a tenth, without one that is none.
pub(super) fn tenths(value: f64) -> String {
    let text = format!("{:.1}", value + 0.0);
    let text = text.strip_suffix(".0").unwrap_or(&text);
    if text == "-0" { "0".into() } else { signed(text) }
}

/// With the sign that is as wide as a digit.
fn signed(number: &str) -> String {
    number.replace('-', "\u{2212}")
}

/// A share as a bar with its 95 % interval, on a scale that ends at `most`; `limit` is where a gate closes.
pub(super) fn bar(name: &str, share: Share, class: &str, most: f64, limit: Option<f64>) -> String {
    let at = |value: f64| 100.0 * (value / most).clamp(0.0, 1.0);
    let [low, high] = share.interval();
    let said = format!(
        "{name}: {} of {}, {}, 95\u{a0}% interval {} to {}",
        share.count,
        share.of,
        percent(share.value()),
        percent(low),
        percent(high)
    );
    let mut svg = format!("<svg class=\"bar\" role=\"img\" aria-label=\"{said}\"><title>{said}</title>");
    svg.push_str("<rect class=\"track\" width=\"100%\" y=\"4\" height=\"14\"/>");
    let [value, low, high] = [share.value(), low, high].map(at);
    let _ = write!(svg, "<rect class=\"{class}\" width=\"{value:.2}%\" y=\"4\" height=\"14\"/>");
    let _ = write!(svg, "<line class=\"whisker\" x1=\"{low:.2}%\" x2=\"{high:.2}%\" y1=\"11\" y2=\"11\"/>");
    for end in [low, high] {
        let _ = write!(svg, "<line class=\"whisker\" x1=\"{end:.2}%\" x2=\"{end:.2}%\" y1=\"7\" y2=\"15\"/>");
    }
    if let Some(limit) = limit {
        draw_mark(&mut svg, at(limit), "limit", &format!("the most that passes: {}", percent(limit)));
    }
    svg.push_str("</svg>");
    svg
}

/// A rate on a scale from 0 to 1, the band that chance alone reaches, and the level of alarm.
pub(super) fn gauge(rate: f64, chance: [f64; 2], level: f64) -> String {
    let at = |value: f64| 100.0 * value.clamp(0.0, 1.0);
    let said = format!(
        "Conflict rate {}; chance alone reaches {} to {}; alarm above {}",
        percent(rate),
        percent(chance[0]),
        percent(chance[1]),
        percent(level)
    );
    let mut svg = format!("<svg class=\"bar\" role=\"img\" aria-label=\"{said}\"><title>{said}</title>");
    let [from, to] = chance.map(at);
    svg.push_str("<rect class=\"track\" width=\"100%\" y=\"4\" height=\"14\"/>");
    let _ = write!(svg, "<rect class=\"chance\" x=\"{from:.2}%\" width=\"{:.2}%\" y=\"4\" height=\"14\"/>", to - from);
    draw_mark(&mut svg, at(level), "limit", &format!("alarm above {}", percent(level)));
    let _ = write!(svg, "<circle class=\"after\" cx=\"{:.2}%\" cy=\"11\" r=\"6\"/></svg>", at(rate));
    svg
}

/// A level across a bar, with a rim that sets it off from what is under it.
fn draw_mark(svg: &mut String, at: f64, class: &str, title: &str) {
    for class in ["rim", class] {
        let _ = write!(
            svg,
            "<line class=\"{class}\" x1=\"{at:.2}%\" x2=\"{at:.2}%\" y1=\"0\" y2=\"22\"><title>{title}</title></line>"
        );
    }
}

/// The numbers under bars on a scale that ends at `most`.
pub(super) fn scale(most: f64) -> String {
    let mut svg = String::from("<svg class=\"scale\" aria-hidden=\"true\">");
    for (part, anchor) in [(0.0, "start"), (0.25, "middle"), (0.5, "middle"), (0.75, "middle"), (1.0, "last")] {
        let at = 100.0 * part;
        let _ = write!(svg, "<line class=\"zero\" x1=\"{at}%\" x2=\"{at}%\" y1=\"0\" y2=\"4\"/>");
        let _ = write!(svg, "<text class=\"{anchor}\" x=\"{at}%\" y=\"16\">{}</text>", percent(part * most));
    }
    svg.push_str("</svg>");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(unit: Unit, values: &[Option<f64>]) -> String {
        let points = (1..).zip(values.iter().copied()).collect();
        Curve::new("Loss", "nats", unit, points).draw().unwrap_or_default()
    }

    /// The coordinates of the line of a curve.
    fn line(svg: &str) -> &str {
        svg.split("class=\"line\" d=\"").nth(1).and_then(|rest| rest.split('"').next()).unwrap_or_default()
    }

    fn ticks(axis: &Axis, unit: Unit) -> Vec<String> {
        axis.ticks().map(|tick| tick_label(tick, axis.tick, unit)).collect()
    }

    #[test]
    fn a_gap_breaks_the_line_and_one_point_is_a_dot() {
        let gaps = drawn(Unit::Plain, &[None, Some(2.0), Some(1.0), None, None, Some(1.5), None]);
        assert_eq!((line(&gaps).matches('M').count(), line(&gaps).matches('L').count()), (2, 1), "{gaps}");
        let one = drawn(Unit::Plain, &[Some(0.5)]);
        assert!(one.contains("h.01") && one.contains("<title>step 1: 0.500</title>"), "{one}");
        assert_eq!(drawn(Unit::Plain, &[None, None]), "");
        assert_eq!(drawn(Unit::Plain, &[]), "");
    }

    #[test]
    fn whatever_the_figures_are_the_coordinates_are_numbers_inside_the_drawing() {
        let many: Vec<_> = (0..500).map(|at| (at % 7 != 0).then_some(f64::from(at).sin())).collect();
        let odd = [Some(f64::NAN), Some(f64::INFINITY), Some(1e300), Some(-1e300), Some(f64::MIN_POSITIVE), Some(0.0)];
        for values in [&many[..], &odd, &[Some(0.0); 3], &[Some(-3.5); 50], &[Some(1e-9), Some(2e-9)], &[Some(f64::NAN)]] {
            for unit in [Unit::Plain, Unit::Share] {
                let svg = drawn(unit, values);
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
                let coordinates = line(&svg).split(['M', 'L', ' ']).filter(|part| !part.is_empty());
                let numbers: Vec<f64> = coordinates.map(|part| part.parse().expect("a number")).collect();
                assert!(numbers.iter().all(|number| (0.0..=SIZE[0]).contains(number)), "{svg}");
            }
        }
    }

    #[test]
    fn ticks_are_round_and_say_no_more_digits_than_they_need() {
        assert_eq!(ticks(&Axis::around(0.0, 2.3), Unit::Plain), ["0.0", "0.5", "1.0", "1.5", "2.0", "2.5"]);
        assert_eq!(ticks(&Axis::around(-0.13, 0.2), Unit::Plain), ["−0.2", "−0.1", "0.0", "0.1", "0.2"]);
        assert_eq!(
            ticks(&Axis::around(0.0, 0.24), Unit::Share),
            ["0 %", "5 %", "10 %", "15 %", "20 %", "25 %"].map(|t| t.replace(' ', "\u{a0}"))
        );
        assert_eq!(ticks(&Axis::within(1.0, 150.0, 1.0), Unit::Plain), ["50", "100", "150"]);
        assert_eq!(ticks(&Axis::within(0.0, 2.0, 1.0), Unit::Plain), ["0", "1", "2"]);
    }

    #[test]
    fn a_share_is_drawn_within_its_scale_however_large_it_is() {
        let share = Share { count: 3, of: 4 };
        let svg = bar("Base", share, "before", 0.2, Some(0.9));
        assert!(svg.contains("Base: 3 of 4, 75\u{a0}%") && svg.contains("width=\"100.00%\"") && !svg.contains("NaN"), "{svg}");
        assert!(!bar("Base", Share { count: 0, of: 0 }, "before", 1.0, None).contains("NaN"));
    }
}
