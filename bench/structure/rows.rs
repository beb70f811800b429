//! How fast the structural check reads, on one core: rows of several shapes, made in memory, through `StructureCheck` and, in
//! turns with it, line by line through serde_json into nothing. Prints one JSON object on its last line.

use std::hint::black_box;
use std::time::Instant;

use anyhow::{Result, ensure};
use holdfast_dataset::structure::StructureCheck;
use serde::de::IgnoredAny;
use serde_json::{Value, json};

/// How much there is of each shape.
const BYTES: usize = 64 << 20;

/// The file arrives in pieces of this size, as an upload does.
const PIECE: usize = 64 << 10;

/// Turns of both sides for each shape. The fastest counts: what else the machine does is not what is measured.
const TURNS: usize = 15;

const PLAIN: &str = "a quiet film about a loud family told with patience and some wit";
/// What chats are made of: line ends, quotation marks, letters beyond ASCII.
const CHAT: &str = "so the café said \"no\" \n\n Straße — it is fine 😀 for me then";
const RUSSIAN: &str = "тихий фильм о шумной семье \n \t\"да\"";

/// A shape of rows.
struct Shape {
    name: &'static str,
    /// About how many words the user and the assistant say.
    said: [usize; 2],
    /// Which words, a space between each and the next.
    words: &'static str,
    /// Whether letters beyond ASCII are written as escapes, which is how Python's `json.dumps` writes them.
    escaped: bool,
    /// Whether tools are offered and called.
    tools: bool,
}

const SHAPES: [Shape; 6] = [
    Shape { name: "short", said: [8, 8], words: CHAT, escaped: false, tools: false },
    Shape { name: "usual", said: [140, 30], words: PLAIN, escaped: false, tools: false },
    Shape { name: "chat", said: [120, 60], words: CHAT, escaped: false, tools: false },
    Shape { name: "long", said: [2_000, 1_000], words: CHAT, escaped: false, tools: false },
    Shape { name: "escapes", said: [60, 30], words: RUSSIAN, escaped: true, tools: false },
    Shape { name: "tools", said: [30, 30], words: CHAT, escaped: false, tools: true },
];

fn main() -> Result<()> {
    let mut found = serde_json::Map::new();
    for shape in SHAPES {
        let (text, rows) = rows(&shape);
        let (mut ours, mut ignored) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..TURNS {
            ours = ours.min(seconds(|| check(&text, rows))?);
            ignored = ignored.min(seconds(|| ignore(&text, rows))?);
        }
        let megabytes = text.len() as f64 / 1e6;
        found.insert(
            shape.name.to_owned(),
            json!({
                "bytes_per_row": text.len() / rows,
                "megabytes_per_second": megabytes / ours,
                "serde_json_megabytes_per_second": megabytes / ignored,
            }),
        );
    }
    println!("{}", Value::Object(found));
    Ok(())
}

fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let since = Instant::now();
    work()?;
    Ok(since.elapsed().as_secs_f64())
}

fn check(text: &str, rows: usize) -> Result<()> {
    let mut check = StructureCheck::default();
    for piece in text.as_bytes().chunks(PIECE) {
        check.push(black_box(piece));
    }
    let report = check.finish();
    ensure!(report.rows == rows as u64 && report.error_count == 0, report.summary());
    Ok(())
}

fn ignore(text: &str, rows: usize) -> Result<()> {
    let mut count = 0;
    for line in text.lines() {
        black_box(serde_json::from_str::<IgnoredAny>(black_box(line))?);
        count += 1;
    }
    ensure!(count == rows, "{count} rows of {rows}");
    Ok(())
}

/// Rows of one shape and their number; the same in every run.
fn rows(shape: &Shape) -> (String, usize) {
    let words: Vec<&str> = shape.words.split(' ').collect();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut say = |about: usize| {
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize
        };
        let count = about / 2 + next() % about + 1;
        (0..count).map(|_| words[next() % words.len()]).collect::<Vec<_>>().join(" ")
    };
    let offered = json!([{"type": "function", "function": {"name": "look_up", "description": "Looks a film up.", "parameters": {
        "type": "object", "properties": {"title": {"type": "string"}, "year": {"type": "integer"}}, "required": ["title"],
    }}}]);
    let (mut text, mut rows) = (String::with_capacity(BYTES + (1 << 20)), 0);
    while text.len() < BYTES {
        let [user, assistant] = shape.said.map(&mut say);
        let mut messages =
            vec![json!({"role": "system", "content": "You are a helpful assistant."}), json!({"role": "user", "content": user})];
        if shape.tools {
            let call =
                json!({"id": "call_1", "type": "function", "function": {"name": "look_up", "arguments": {"title": say(3)}}});
            messages.push(json!({"role": "assistant", "content": null, "tool_calls": [call]}));
            messages.push(json!({"role": "tool", "tool_call_id": "call_1", "content": say(8)}));
        }
        messages.push(json!({"role": "assistant", "content": assistant}));
        let mut row = json!({"messages": messages});
        if shape.tools {
            row["tools"] = offered.clone();
        }
        let line = row.to_string();
        if shape.escaped {
            let units = line.chars().flat_map(|c| c.encode_utf16(&mut [0; 2]).to_vec());
            text.extend(units.map(|unit| match u8::try_from(unit) {
                Ok(ascii) if ascii.is_ascii() => char::from(ascii).to_string(),
                _ => format!("\\u{unit:04x}"),
            }));
        } else {
            text.push_str(&line);
        }
        text.push('\n');
        rows += 1;
    }
    (text, rows)
}
