//! Lines that someone wrote to do harm: each is accepted or a clear error, none makes the check fail, and its time grows with
//! the line's length and not faster.

use std::time::{Duration, Instant};

use holdfast_domain::hyperparameters::LongRows;
use holdfast_domain::limits::MAX_LINE_BYTES;

use crate::check::{Report, encode_file};
use crate::encode::EncodeOptions;
use crate::structure::StructureCheck;
use crate::tiny;

fn check(file: &[u8]) -> Report {
    let mut check = StructureCheck::default();
    check.push(file);
    check.finish()
}

/// The first error, or "accepted".
fn verdict(file: &[u8]) -> String {
    check(file).errors.first().map_or_else(|| "accepted".into(), ToString::to_string)
}

/// Rows that hold `json` wherever a row holds anything.
fn everywhere(json: &str) -> [String; 10] {
    let message = |field: &str| {
        format!(r#"{{"messages":[{{"role":"user","content":"u"}},{{"role":"assistant","content":"a","{field}":{json}}}]}}"#)
    };
    let turns = r#"[{"role":"user","content":"u"},{"role":"assistant","content":"a"}]"#;
    [
        json.into(),
        format!(r#"{{"messages":{json}}}"#),
        format!(r#"{{"messages":[{json}]}}"#),
        format!(r#"{{"messages":[{{"role":{json},"content":"u"}}]}}"#),
        format!(r#"{{"messages":[{{"role":"user","content":{json}}}]}}"#),
        format!(r#"{{"prompt":{json},"completion":"c"}}"#),
        format!(r#"{{"messages":{turns},"tools":{json}}}"#),
        message("tool_calls"),
        message("weight"),
        message("unknown"),
    ]
}

#[test]
fn deep_nesting_is_refused_where_it_would_be_read_and_skipped_elsewhere() {
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    assert_eq!(
        everywhere(&deep).map(|row| verdict(row.as_bytes())),
        [
            "line 1: expected a JSON object, found an array",
            "line 1: messages[0]: expected an object with role and content, found an array",
            "line 1: messages[0]: expected an object with role and content, found an array",
            "line 1: messages[0].role: expected a string, found an array",
            "line 1: messages[0].content: expected a string; content in parts is not supported, found an array",
            "line 1: prompt: expected a string, found an array",
            "line 1: tools: is nested deeper than 127 levels",
            "line 1: messages[1].tool_calls: is nested deeper than 127 levels",
            "line 1: messages[1].weight: expected 0 or 1, found an array",
            "accepted",
        ]
    );
    for open in ["[", r#"{"a":"#] {
        for row in everywhere(&open.repeat(100_000)) {
            assert!(verdict(row.as_bytes()).contains("not valid JSON at column "), "{}", verdict(row.as_bytes()));
        }
    }
}

#[test]
fn as_deep_as_may_be_is_still_rendered() {
    let row = |levels: usize| {
        let tools = format!("{}{}", "[".repeat(levels), "]".repeat(levels));
        format!(r#"{{"messages":[{{"role":"user","content":"u"}},{{"role":"assistant","content":"a"}}],"tools":{tools}}}"#)
    };
    let options = EncodeOptions { max_length: 1_000, long_rows: LongRows::Error };
    let report = encode_file(row(127).as_bytes(), &tiny::tokenizer(), options, |_, _| {});
    assert_eq!(report.map(|report| report.rows).ok(), Some(1));
    assert_eq!(verdict(row(128).as_bytes()), "line 1: tools: is nested deeper than 127 levels");
}

#[test]
fn a_repeated_key_is_refused_where_it_is_read() {
    let good = r#""messages":[{"role":"user","content":"u"},{"role":"assistant","content":"a"}]"#;
    for (row, expected) in [
        (format!("{{{good},{}}}", vec![r#""tools":[]"#; 300_000].join(",")), "line 1: the key \"tools\" stands twice; keep one"),
        (format!("{{{good},{good}}}"), "line 1: the key \"messages\" stands twice; keep one"),
        (
            format!(r#"{{"messages":[{{{}}}]}}"#, vec![r#""role":"user""#; 250_000].join(",")),
            "line 1: messages[0]: the key \"role\" stands twice; keep one",
        ),
        (format!("{{{good},{}}}", vec![r#""a":1"#; 600_000].join(",")), "accepted"),
        (format!(r#"{{{good},"tools":[{{{}}}]}}"#, vec![r#""a":1"#; 600_000].join(",")), "accepted"),
    ] {
        assert_eq!(verdict(row.as_bytes()), expected);
    }
}

#[test]
fn numbers_beyond_64_bits_are_refused_where_they_are_read() {
    for number in ["1e999", "-1e999999999999999999999", &"9".repeat(1_000_000)] {
        assert_eq!(
            everywhere(number).map(|row| verdict(row.as_bytes())),
            [
                "line 1: expected a JSON object, found a number",
                "line 1: messages: expected an array, found a number",
                "line 1: messages[0]: expected an object with role and content, found a number",
                "line 1: messages[0].role: expected a string, found a number",
                "line 1: messages[0].content: expected a string, found a number",
                "line 1: prompt: expected a string, found a number",
                "line 1: tools: expected an array, found a number",
                "line 1: messages[1].tool_calls: expected an array, found a number",
                "line 1: messages[1].weight: expected 0 or 1",
                "accepted",
            ]
        );
        let [.., tools, _, _, _] = everywhere(&format!("[{number}]"));
        assert_eq!(verdict(tools.as_bytes()), "line 1: tools: holds a number that is too large for 64 bits");
    }
}

#[test]
fn half_a_character_is_refused_where_it_is_read() {
    const WHAT: &str = "an escape from \\ud800 to \\udfff stands without its other half; write the whole character or remove it";
    for half in [r#""\ud83d""#, r#""a\ude00b""#, r#""\ud83d\ud83d""#, r#""\ud83d\n""#] {
        let at = |path: &str| format!("line 1: {path}: {WHAT}");
        let found = everywhere(half).map(|row| verdict(row.as_bytes()));
        assert_eq!(found.get(3..6), Some([at("messages[0].role"), at("messages[0].content"), at("prompt")].as_slice()), "{half}");
        assert_eq!(found.last().map(String::as_str), Some("accepted"), "{half}");
        let [.., tools, calls, _, _] = everywhere(&format!("[{half}]")).map(|row| verdict(row.as_bytes()));
        assert_eq!([tools, calls], [at("tools"), at("messages[1].tool_calls")], "{half}");
        assert_eq!(verdict(format!(r#"{{{half}:1,"prompt":"p","completion":"c"}}"#).as_bytes()), format!("line 1: {WHAT}"));
        let key = format!(r#"{{"messages":[{{{half}:1,"role":"user","content":"u"}}]}}"#);
        assert_eq!(verdict(key.as_bytes()), at("messages[0]"));
    }
    assert_eq!(verdict(r#"{"prompt":"\ud83d\ude00","completion":"c"}"#.as_bytes()), "accepted");
}

#[test]
fn nul_is_a_character_when_it_is_an_escape_and_none_otherwise() {
    assert_eq!(verdict(br#"{"prompt":"\u0000","completion":"\u0000"}"#), "accepted");
    assert_eq!(
        verdict(b"{\"prompt\":\"\0\",\"completion\":\"c\"}"),
        "line 1: not valid JSON at column 11: a control character stands in a string; write it as an escape, as \\n or \\u0000"
    );
    assert_eq!(verdict(b"\0\0\0"), "line 1: not valid JSON at column 1: check quotes, commas and escapes");
}

#[test]
fn another_encoding_is_named() {
    let row = r#"{"prompt":"p","completion":"c"}"#;
    let marked = format!("\u{feff}{row}\n{row}\n");
    let report = check(marked.as_bytes());
    assert_eq!((report.rows, report.error_count), (1, 1));
    assert_eq!(verdict(marked.as_bytes()), "line 1: begins with a byte order mark; save the file as UTF-8 without one");
    let utf16: Vec<u8> = format!("\u{feff}{row}").encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(verdict(&utf16), "line 1: not UTF-8 at byte 1 of the line; it is UTF-16, save the file as UTF-8");
}

#[test]
fn line_ends_of_old_are_named() {
    let row = r#"{"prompt":"p","completion":"c"}"#;
    assert_eq!(
        verdict(format!("{row}\r{row}\r").as_bytes()),
        "line 1: not valid JSON at column 33: the row before it ends with a carriage return alone; end every row with a line feed"
    );
    assert_eq!(
        verdict(format!("{row} {row}").as_bytes()),
        "line 1: not valid JSON at column 33: the object ends before it; put every row on a line of its own"
    );
    assert_eq!(verdict(format!("{row}\r\n{row}\r\n").as_bytes()), "accepted");
    assert_eq!(
        verdict(format!("{row}\r").repeat(MAX_LINE_BYTES / row.len()).as_bytes()),
        "line 1: is longer than 4194304 bytes; every row ends with a line feed"
    );
}

#[test]
fn a_line_of_one_string_is_read_up_to_the_limit() {
    let row = |bytes: usize| format!(r#"{{"prompt":"{}","completion":"c"}}"#, "x".repeat(bytes - 31 + 1));
    assert_eq!(row(MAX_LINE_BYTES).len(), MAX_LINE_BYTES);
    assert_eq!(verdict(row(MAX_LINE_BYTES).as_bytes()), "accepted");
    assert_eq!(
        verdict(row(MAX_LINE_BYTES + 1).as_bytes()),
        "line 1: is longer than 4194304 bytes; every row ends with a line feed"
    );
    let open = format!(r#"{{"prompt":"{}"#, "x".repeat(MAX_LINE_BYTES - 20));
    assert!(verdict(open.as_bytes()).ends_with("was the file cut, or is one object spread over several lines?"));
}

#[test]
fn the_time_of_a_line_grows_with_its_length_and_not_faster() {
    let unit = |piece: &'static str| move |bytes: usize| piece.repeat(bytes / piece.len());
    let rows: [(&str, &dyn Fn(usize) -> String); 9] = [
        ("brackets", &unit("[")),
        ("braces", &unit(r#"{"a":"#)),
        ("escapes", &|bytes| format!(r#"{{"prompt":"{}","completion":"c"}}"#, unit(r"\u0000\n")(bytes))),
        ("halves", &|bytes| format!(r#"{{"prompt":"{}","completion":"c"}}"#, unit(r"\ud83d\ud83d")(bytes))),
        ("keys", &|bytes| format!(r#"{{{}"prompt":"p","completion":"c"}}"#, unit(r#""a":{},"#)(bytes))),
        ("keys of tools", &|bytes| format!(r#"{{"messages":[],"tools":[{{{}"b":1}}]}}"#, unit(r#""a":{},"#)(bytes))),
        ("messages", &|bytes| format!(r#"{{"messages":[{}{{}}]}}"#, unit(r#"{"role":"user"},"#)(bytes))),
        ("digits", &|bytes| format!(r#"{{"messages":[{{"role":"user","weight":{}}}]}}"#, unit("9")(bytes))),
        ("carriage returns", &unit("{}\r")),
    ];
    let fastest = |row: String| {
        let taken = (0..3).map(|_| {
            let since = Instant::now();
            assert!(check(row.as_bytes()).errors.len() <= 1);
            since.elapsed()
        });
        taken.min().unwrap_or_default()
    };
    for (name, row) in rows {
        // 16 times as long; what is quadratic takes 256 times as long.
        let (short, long) = (fastest(row(1 << 18)), fastest(row(1 << 22)));
        assert!(long < 80 * short.max(Duration::from_micros(50)), "{name}: {short:?}, then {long:?}");
    }
}
