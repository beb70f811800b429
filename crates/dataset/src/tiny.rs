//! A tokenizer for tests: one token a byte, as byte-level BPE without merges has them, and two special tokens.

use serde_json::json;

use crate::tokenizer::{ChatTokenizer, SpecialTokens};

/// Each turn is its role, a line end, its content, a special token and a line end.
const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{{ message.role + '\\n' + message.content + eos_token + '\\n' }}\
    {% endfor %}{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}";

pub(crate) fn tokenizer() -> ChatTokenizer {
    let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
    let mut letters: Vec<String> = alphabet.into_iter().map(String::from).collect();
    letters.sort_unstable();
    let vocabulary: serde_json::Map<_, _> = letters.into_iter().zip(2..).map(|(letter, id)| (letter, json!(id))).collect();
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(0, "<begin>"), special(1, "<end>")],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    let specials = SpecialTokens { bos_token: "<begin>".into(), eos_token: "<end>".into(), stop_ids: vec![1] };
    ChatTokenizer::new(tokenizer.to_string().as_bytes(), TEMPLATE, specials).expect("a tokenizer")
}
