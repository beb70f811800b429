//! What every section is put together from.

use std::fmt::Write as _;

use crate::report::plot::Curve;

pub(super) fn counted(count: u64, what: &str) -> String {
    if count == 1 { format!("1 {what}") } else { format!("{count} {what}s") }
}

/// A table of cells that are HTML already. A column whose title begins with # has numbers.
pub(super) fn table(caption: &str, columns: &[&str], rows: &[Vec<String>]) -> String {
    let mut html = String::from("<div class=\"wide\"><table>\n");
    if !caption.is_empty() {
        let _ = writeln!(html, "<caption>{caption}</caption>");
    }
    let class = |column: &str| if column.starts_with('#') { " class=\"number\"" } else { "" };
    html.push_str("<thead><tr>");
    for column in columns {
        let _ = write!(html, "<th scope=\"col\"{}>{}</th>", class(column), column.trim_start_matches('#'));
    }
    html.push_str("</tr></thead>\n<tbody>\n");
    for row in rows {
        html.push_str("<tr>");
        for (at, (cell, column)) in row.iter().zip(columns).enumerate() {
            let class = class(column);
            let _ = if at == 0 {
                write!(html, "<th scope=\"row\"{class}>{cell}</th>")
            } else {
                write!(html, "<td{class}>{cell}</td>")
            };
        }
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody>\n</table></div>\n");
    html
}

/// A curve with its name and the key of its levels; empty where there is no point.
pub(super) fn figure(curve: &Curve<'_>) -> String {
    let Some(drawn) = curve.draw() else { return String::new() };
    let mean = match curve.window() {
        1 => String::new(),
        window => key("line", &format!("mean of {window} dots")),
    };
    let levels: String = curve.levels.iter().map(|(_, class, words)| key(class, words)).collect();
    format!(
        "<figure>\n<figcaption><strong>{}</strong> <span class=\"dim\">{}</span></figcaption>\n{drawn}\n\
         <p class=\"keys\">{mean}{levels}</p>\n</figure>\n",
        curve.name, curve.about
    )
}

/// What a colour means.
pub(super) fn key(class: &str, words: &str) -> String {
    let mark = match class {
        "limit" | "whole" | "line" => format!("<path class=\"{class}\" d=\"M0 5H18\"/>"),
        "chance" => "<rect class=\"chance\" width=\"18\" height=\"10\"/>".to_owned(),
        _ => format!("<circle class=\"{class}\" cx=\"9\" cy=\"5\" r=\"5\"/>"),
    };
    format!("<span><svg class=\"key\" width=\"18\" height=\"10\" aria-hidden=\"true\">{mark}</svg>{words}</span> ")
}
