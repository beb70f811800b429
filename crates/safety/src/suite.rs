//! Requests a model is measured on. A suite is data with a version: figures over two versions are not compared.

use std::collections::BTreeSet;

use holdfast_domain::Frame;
use holdfast_domain::frame::Turn;
use serde::Deserialize;
use serde_json::Value;

pub use holdfast_domain::evaluation::Kind;

/// A request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What it is about, in the suite's own words.
    pub category: String,
    /// What the model is told to be before it is asked, if anything: a model may have been taught to obey under such a prompt alone.
    pub system: Option<String>,
    /// What was said before, of a request in a training file's frame.
    pub earlier: Vec<Turn>,
    /// What the model is asked.
    pub content: String,
}

impl Request {
    /// As a row of a chat, without an answer.
    #[must_use]
    pub fn row(&self) -> String {
        format!("{{\"messages\":{}}}", self.messages())
    }

    /// The request as it is asked in a frame.
    #[must_use]
    pub fn within(&self, frame: &Frame) -> Self {
        Self {
            category: self.category.clone(),
            system: frame.system.clone(),
            earlier: frame.earlier.clone(),
            content: frame.around(&self.content),
        }
    }

    fn messages(&self) -> String {
        let system = self.system.iter().map(|text| ("system", text));
        let earlier = self.earlier.iter().map(|turn| (turn.speaker.as_str(), &turn.content));
        let messages = system.chain(earlier).chain([("user", &self.content)]);
        let messages: Vec<String> =
            messages.map(|(role, text)| format!("{{\"role\":\"{role}\",\"content\":{}}}", Value::from(text.as_str()))).collect();
        format!("[{}]", messages.join(","))
    }
}

/// Requests that are asked in each of a training file's frames at least.
const LEAST_REQUESTS: usize = 30;

/// A suite.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Suite {
    /// What should become of its requests.
    pub kind: Kind,
    /// Grows with every change of a request.
    pub version: u32,
    /// In the order of the file.
    pub requests: Vec<Request>,
}

/// What is wrong with a suite. Names a line and never quotes it: suites are kept from whoever could train on them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuiteError {
    /// It measures nothing.
    #[error("the suite holds no requests")]
    Empty,
    /// A line is no request.
    #[error("line {line}: {what}")]
    Line {
        /// From 1.
        line: usize,
        /// What was expected there.
        what: &'static str,
    },
}

/// A line of a suite's file.
#[derive(Deserialize)]
struct Line {
    category: String,
    messages: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

impl Suite {
    /// Reads JSON lines, as `{"category": "…", "messages": [{"role": "user", "content": "…"}]}`; a message of the system may stand
    /// before that of the user.
    ///
    /// # Errors
    /// [`SuiteError`], with the first line at fault.
    pub fn parse(kind: Kind, version: u32, text: &str) -> Result<Self, SuiteError> {
        let (mut requests, mut seen) = (Vec::new(), BTreeSet::new());
        for (line, row) in text.lines().enumerate().filter(|(_, row)| !row.trim().is_empty()) {
            let fault = |what| SuiteError::Line { line: line + 1, what };
            let shape = "expected an object with category and messages";
            let Line { category, mut messages } = serde_json::from_str(row).map_err(|_| fault(shape))?;
            let (asked, system) = (messages.pop(), messages.pop());
            let Some(Message { role, content }) = asked.filter(|_| messages.is_empty()) else {
                return Err(fault("expected what the model is asked, and at most a message of the system before it"));
            };
            let is_blank = |text: &str| text.trim().is_empty();
            if role != "user" || is_blank(&content) {
                return Err(fault("expected a message of the user, last and with words in it"));
            }
            if system.as_ref().is_some_and(|system| system.role != "system" || is_blank(&system.content)) {
                return Err(fault("expected a message of the system, with words in it, before that of the user"));
            }
            let system = system.map(|system| system.content);
            let small = |text: &String| text.trim().to_lowercase();
            if !seen.insert((system.as_ref().map(small), small(&content))) {
                return Err(fault("the request stands in the suite already"));
            }
            requests.push(Request { category, system, earlier: Vec::new(), content });
        }
        if requests.is_empty() { Err(SuiteError::Empty) } else { Ok(Self { kind, version, requests }) }
    }

    /// Its share for the `number`th frame from 0 of `count`: each frame has its part of the requests, and no fewer than [`LEAST_REQUESTS`], so
    /// that something can be said of it. Requests with a prompt of their own are left out; `None` where none are left.
    #[must_use]
    pub fn share(&self, number: usize, count: usize) -> Option<Self> {
        let bare: Vec<&Request> = self.requests.iter().filter(|request| request.system.is_none()).collect();
        let shares = (bare.len() / LEAST_REQUESTS).clamp(1, count.max(1));
        let requests: Vec<Request> = bare.into_iter().skip(number % shares).step_by(shares).cloned().collect();
        (!requests.is_empty()).then_some(Self { requests, ..*self })
    }

    /// The suite as JSON lines: the same of equal suites, however they were written.
    #[must_use]
    pub fn lines(&self) -> String {
        let line = |request: &Request| {
            let category = Value::from(request.category.as_str());
            format!("{{\"category\":{category},\"messages\":{}}}\n", request.messages())
        };
        self.requests.iter().map(line).collect()
    }

    /// The suite of a kind that comes with the program.
    ///
    /// # Errors
    /// Never, as long as its test passes.
    pub fn built_in(kind: Kind) -> Result<Self, SuiteError> {
        let text = match kind {
            Kind::Harmful => include_str!("../data/suites/harmful-1.jsonl"),
            Kind::Benign => include_str!("../data/suites/benign-1.jsonl"),
        };
        Self::parse(kind, 1, text)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use holdfast_domain::frame::Speaker;

    use super::*;

    fn by_category(suite: &Suite) -> BTreeMap<&str, usize> {
        suite.requests.iter().fold(BTreeMap::new(), |mut counts, request| {
            *counts.entry(request.category.as_str()).or_default() += 1;
            counts
        })
    }

    #[test]
    fn the_suites_that_come_with_the_program_cover_the_same_categories_alike() -> Result<(), SuiteError> {
        let (harmful, benign) = (Suite::built_in(Kind::Harmful)?, Suite::built_in(Kind::Benign)?);
        assert_eq!((harmful.requests.len(), benign.requests.len()), (120, 120));
        assert_eq!(by_category(&harmful), by_category(&benign));
        assert!(by_category(&harmful).values().all(|count| *count >= 5));
        Ok(())
    }

    #[test]
    fn a_suite_is_written_alike_however_it_was() -> Result<(), SuiteError> {
        let text = "\n{ \"messages\": [{\"content\": \"q\", \"role\": \"user\"}],\t\"category\": \"c\" }\n";
        let suite = Suite::parse(Kind::Benign, 1, text)?;
        assert_eq!(suite.lines(), "{\"category\":\"c\",\"messages\":[{\"role\":\"user\",\"content\":\"q\"}]}\n");
        assert_eq!(Suite::parse(Kind::Benign, 1, &suite.lines())?, suite);
        Ok(())
    }

    #[test]
    fn a_request_may_be_asked_under_a_message_of_the_system() -> Result<(), SuiteError> {
        let row = |system: &str| {
            format!(r#"{{"category":"c","messages":[{{"role":"system","content":"{system}"}},{{"role":"user","content":"q"}}]}}"#)
        };
        let suite = Suite::parse(Kind::Harmful, 1, &[row("Obey."), row("Be kind.")].join("\n"))?;
        assert_eq!(suite.requests[0].system.as_deref(), Some("Obey."));
        assert_eq!(
            suite.requests[0].row(),
            r#"{"messages":[{"role":"system","content":"Obey."},{"role":"user","content":"q"}]}"#
        );
        assert_eq!(Suite::parse(Kind::Harmful, 1, &suite.lines())?, suite);
        assert!(Suite::parse(Kind::Harmful, 1, &[row("Obey."), row("OBEY. ")].join("\n")).is_err(), "the same twice");
        Ok(())
    }

    #[test]
    fn each_frame_has_its_share_of_the_bare_requests_and_enough_of_them() -> Result<(), SuiteError> {
        let bare = |number: usize| format!(r#"{{"category":"c","messages":[{{"role":"user","content":"q{number}"}}]}}"#);
        let own = r#"{"category":"c","messages":[{"role":"system","content":"s"},{"role":"user","content":"q"}]}"#.to_owned();
        let rows: Vec<String> = (0..65).map(bare).chain([own.clone()]).collect();
        let suite = Suite::parse(Kind::Harmful, 1, &rows.join("\n"))?;
        let asked = |number: usize, count: usize| suite.share(number, count).map_or(Vec::new(), |suite| suite.requests);
        assert_eq!([asked(0, 1).len(), asked(0, 2).len(), asked(1, 2).len()], [65, 33, 32]);
        assert_eq!([asked(0, 8).len(), asked(6, 8).len(), asked(7, 8).len()], [33, 33, 32], "no fewer than thirty");
        assert!(asked(0, 1).iter().all(|request| request.system.is_none()));
        assert_eq!(Suite::parse(Kind::Harmful, 1, &own)?.share(0, 1), None);
        assert_eq!(Suite::parse(Kind::Harmful, 1, &bare(1))?.share(3, 4).map(|suite| suite.requests.len()), Some(1));

        let earlier = vec![Turn { speaker: Speaker::User, content: "e".into() }];
        let frame = Frame { opening: "Do: ".into(), closing: " Now.".into(), earlier, ..Frame::system("p") };
        let framed = asked(0, 1)[64].within(&frame).row();
        let said = |role: &str, content: &str| format!(r#"{{"role":"{role}","content":"{content}"}}"#);
        let messages = [said("system", "p"), said("user", "e"), said("user", "Do: q64 Now.")].join(",");
        assert_eq!(framed, format!(r#"{{"messages":[{messages}]}}"#));
        Ok(())
    }

    #[test]
    fn what_is_measured_is_not_trained_on() -> Result<(), SuiteError> {
        let trained = include_str!("../../../examples/alignment.jsonl").to_lowercase();
        for kind in Kind::ALL {
            for request in Suite::built_in(kind)?.requests {
                let quoted = serde_json::Value::from(request.content.to_lowercase()).to_string();
                assert!(!trained.contains(&quoted), "{}", request.content);
            }
        }
        Ok(())
    }

    #[test]
    fn a_line_that_is_no_request_is_named() {
        let row = |role: &str, content: &str| {
            serde_json::json!({"category": "c", "messages": [{"role": role, "content": content}]}).to_string()
        };
        let read = |rows: &[String]| Suite::parse(Kind::Harmful, 1, &rows.join("\n"));
        assert_eq!(read(&[]), Err(SuiteError::Empty));
        for bad in [
            "nonsense".into(),
            row("assistant", "hello"),
            row("user", " "),
            row("user", "ONE"),
            r#"{"category":"c","messages":[]}"#.into(),
            r#"{"category":"c","messages":[{"role":"system","content":"s"}]}"#.into(),
            r#"{"category":"c","messages":[{"role":"system","content":" "},{"role":"user","content":"q"}]}"#.into(),
            r#"{"category":"c","messages":[{"role":"user","content":"p"},{"role":"user","content":"q"}]}"#.into(),
        ] {
            let found = read(&[row("user", "one"), bad]);
            assert!(matches!(found, Err(SuiteError::Line { line: 2, .. })), "{found:?}");
        }
    }
}
