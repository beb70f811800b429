//! Hostile and truncated files, and the order of rotary rows.

use super::*;

/// Writes a GGUF header by hand: no library would write the files these tests need.
#[derive(Default)]
struct Header {
    entries: Vec<u8>,
    entry_count: u64,
    tensors: Vec<u8>,
    tensor_count: u64,
}

const U32: u32 = 4;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

fn text(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

impl Header {
    fn entry(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        text(&mut self.entries, key);
        self.entries.extend(kind.to_le_bytes());
        self.entries.extend(value);
        self.entry_count += 1;
        self
    }

    fn tensor(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        text(&mut self.tensors, name);
        self.tensors.extend(u32::try_from(dims.len()).expect("few").to_le_bytes());
        self.tensors.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.tensor_count += 1;
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3_u32.to_le_bytes());
        bytes.extend(self.tensor_count.to_le_bytes());
        bytes.extend(self.entry_count.to_le_bytes());
        bytes.extend(&self.entries);
        bytes.extend(&self.tensors);
        bytes
    }
}

fn refusal(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, bytes).expect("a file");
    let out = folder.path().join("out");
    std::fs::create_dir(&out).expect("a folder");
    crate::import(&path, &out).map_or_else(|e| e.to_string(), |_| "accepted".into())
}

fn llama() -> Header {
    let mut header = Header::default().entry("general.architecture", STRING, &[&5_u64.to_le_bytes()[..], b"llama"].concat());
    for (key, value) in [
        ("embedding_length", 8_u32),
        ("feed_forward_length", 8),
        ("block_count", 1),
        ("attention.head_count", 2),
        ("context_length", 64),
    ] {
        header = header.entry(&format!("llama.{key}"), U32, &value.to_le_bytes());
    }
    header
}

#[test]
fn lengths_that_lie_are_refused_without_allocating_them() {
    let huge = (1_u64 << 60).to_le_bytes();
    let array = |kind: u32| [&kind.to_le_bytes()[..], &huge].concat();
    let hostile = [
        Header::default().entry("a", STRING, &huge).bytes(),
        Header::default().entry("a", ARRAY, &array(U32)).bytes(),
        Header { tensor_count: 1 << 60, ..Header::default() }.bytes(),
        Header { entry_count: 1 << 60, ..Header::default() }.bytes(),
        Header::default().entry("a", ARRAY, &[&ARRAY.to_le_bytes()[..], &1_u64.to_le_bytes()].concat().repeat(50_000)).bytes(),
        Header::default().entry("general.alignment", U32, &0_u32.to_le_bytes()).bytes(),
        b"GGUF".to_vec(),
        b"not a model".to_vec(),
    ];
    for bytes in hostile {
        let message = refusal(&bytes);
        assert!(message.contains("not a sound GGUF file"), "{message}");
    }
}

#[test]
fn a_tensor_outside_the_file_or_of_absurd_shape_is_named() {
    let gpt2 = |header: Header| {
        let list = |items: &[&str]| {
            let mut value = STRING.to_le_bytes().to_vec();
            value.extend((items.len() as u64).to_le_bytes());
            items.iter().for_each(|item| text(&mut value, item));
            value
        };
        let string = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
        let kinds = [&5_u32.to_le_bytes()[..], &2_u64.to_le_bytes(), &1_i32.to_le_bytes(), &3_i32.to_le_bytes()].concat();
        header
            .entry("tokenizer.ggml.model", STRING, &string("gpt2"))
            .entry("tokenizer.ggml.pre", STRING, &string("smollm"))
            .entry("tokenizer.ggml.tokens", ARRAY, &list(&["a", "<e>"]))
            .entry("tokenizer.ggml.merges", ARRAY, &list(&[]))
            .entry("tokenizer.ggml.token_type", ARRAY, &kinds)
            .entry("tokenizer.chat_template", STRING, &string("{{ messages[0].content }}"))
    };
    let cases = [
        (llama().tensor("token_embd.weight", &[8, 2], 0, 1 << 40), "do not lie inside the file"),
        (llama().tensor("token_embd.weight", &[8, 2], 0, u64::MAX), "do not lie inside the file"),
        (llama().tensor("token_embd.weight", &[8, 2, 3], 0, 0), "has shape"),
        (llama().tensor("token_embd.weight", &[8, 2], 12, 0), "is stored as Q4K"),
        (llama().tensor("other", &[8, 2], 0, 0), "token_embd.weight is missing"),
    ];
    for (header, named) in cases {
        let message = refusal(&[gpt2(header).bytes(), vec![0; 256]].concat());
        assert!(message.contains(named), "{message}");
    }
}

#[test]
fn another_architecture_is_named() {
    let header = Header::default().entry("general.architecture", STRING, &[&4_u64.to_le_bytes()[..], b"rwkv"].concat());
    assert!(refusal(&[header.bytes(), vec![0; 64]].concat()).contains("\"rwkv\" is not supported"));
}

#[test]
fn every_truncation_of_a_header_is_an_error() {
    let whole = llama().tensor("token_embd.weight", &[8, 2], 0, 0).bytes();
    for length in 0..whole.len() {
        assert_ne!(refusal(&whole[..length]), "accepted", "cut to {length} bytes");
    }
}

#[test]
fn rotary_rows_return_to_the_order_of_hugging_face() {
    // One head of four rows and one column: the converter wrote rows 0, 2, 1, 3.
    assert_eq!(unpermuted(&[0.0, 2.0, 1.0, 3.0], 4, 1), [0.0, 1.0, 2.0, 3.0]);
}
