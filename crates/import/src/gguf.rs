//! A .gguf file: llama.cpp's format, read by candle's parser behind a guard, dequantised one tensor at a time.

use std::borrow::Cow;
use std::cell::RefCell;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value};
use holdfast_base_model::Architecture;
use holdfast_base_model::architecture::ExpectedTensor;
use safetensors::Dtype;

use crate::folder::{self, TensorSource};
use crate::gguf_tokenizer;
use crate::{ImportError, Unsupported};

pub(crate) fn import(source: &Path, out: &Path) -> Result<Architecture, ImportError> {
    let gguf = Gguf::open(source)?;
    let config = gguf.config()?;
    let architecture = Architecture::from_config(&config).map_err(|Unsupported(reason)| gguf.wrong(reason))?;
    let text = gguf_tokenizer::rebuild(&gguf)?;
    folder::write_text(out, &config, &text)?;
    folder::write_weights(out, &architecture, &Llama { gguf: &gguf, architecture: &architecture })?;
    Ok(architecture)
}

/// An open file with its parsed header.
pub(crate) struct Gguf {
    name: String,
    file: RefCell<BufReader<File>>,
    length: u64,
    content: Content,
}

impl Gguf {
    fn open(path: &Path) -> Result<Self, ImportError> {
        let name = path.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into_owned());
        let mut file = BufReader::new(File::open(path).map_err(ImportError::io(path))?);
        let length = file.get_ref().metadata().map_err(ImportError::io(path))?.len();
        let content = Guard::new(&mut file, length.min(MAX_HEADER_BYTES))
            .map_err(candle_core::Error::from)
            .and_then(|mut guarded| Content::read(&mut guarded))
            .map_err(|e| {
                ImportError::format(&name, format!("is not a sound GGUF file (truncated, or its header lies): {}", reason(&e)))
            })?;
        Ok(Self { name, file: RefCell::new(file), length, content })
    }

    pub(crate) fn wrong(&self, reason: impl Into<String>) -> ImportError {
        ImportError::format(&self.name, reason)
    }

    /// A value of the metadata.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.content.metadata.get(key)
    }

    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.get(key)?.to_string().ok().map(String::as_str)
    }

    pub(crate) fn whole(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::I32(n) => u64::try_from(*n).ok(),
            Value::I64(n) => u64::try_from(*n).ok(),
            value => value.to_u64().ok(),
        }
    }

    /// The `config.json` of the model, which comes without one.
    fn config(&self) -> Result<serde_json::Value, ImportError> {
        match self.text("general.architecture") {
            Some("llama") => {}
            other => {
                let found = other.unwrap_or("(none)");
                return Err(self.wrong(format!("general.architecture {found:?} is not supported; supported: \"llama\"")));
            }
        }
        if self.content.tensor_infos.contains_key("rope_freqs.weight") {
            return Err(self.wrong("rope_freqs.weight (the rotary scaling of Llama 3.1 and later) is not supported from GGUF; import the Hugging Face directory of the model"));
        }
        match self.text("llama.rope.scaling.type") {
            None | Some("none") => {}
            Some(other) => {
                return Err(self.wrong(format!(
                    "llama.rope.scaling.type {other:?} is not supported from GGUF; import the Hugging Face directory of the model"
                )));
            }
        }
        let number = |key: &str| {
            let key = format!("llama.{key}");
            self.whole(&key).ok_or_else(|| self.wrong(format!("{key} is missing or no whole number")))
        };
        let float = |key: &str| self.get(&format!("llama.{key}")).and_then(|v| v.to_f32().ok());
        let embedding = self.content.tensor_infos.get("token_embd.weight").map(|t| t.shape.dims().to_vec());
        let vocab_size = embedding.and_then(|d| d.first().copied()).ok_or_else(|| self.wrong("token_embd.weight is missing"))?;
        let heads = number("attention.head_count")?;
        // The same checks as for a config.json, so the same reader makes them.
        let theta = float("rope.freq_base").map_or(10_000.0, decimal);
        Ok(serde_json::json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": vocab_size,
            "hidden_size": number("embedding_length")?,
            "intermediate_size": number("feed_forward_length")?,
            "num_hidden_layers": number("block_count")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.whole("llama.attention.head_count_kv").unwrap_or(heads),
            "head_dim": self.whole("llama.attention.key_length").or_else(|| self.whole("llama.rope.dimension_count")),
            "max_position_embeddings": number("context_length")?,
            // GGUF keeps these as float32; read as decimal, 1e-5 stays 1e-5.
            "rms_norm_eps": float("attention.layer_norm_rms_epsilon").map(decimal),
            "rope_theta": theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "tie_word_embeddings": !self.content.tensor_infos.contains_key("output.weight"),
        }))
    }

    /// A tensor's numbers in float32, once its place in the file is known to exist.
    fn dequantized(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ImportError> {
        let info = self.checked(name, shape)?;
        let mut file = self.file.borrow_mut();
        info.read(&mut *file, self.content.tensor_data_offset, &Device::Cpu)
            .and_then(|quantized| quantized.dequantize(&Device::Cpu))
            .and_then(|tensor| tensor.flatten_all()?.to_vec1::<f32>())
            .map_err(|e| self.wrong(format!("tensor {name}: {}", reason(&e))))
    }

    /// Finds a tensor and makes sure that its shape is the expected one, its numbers are supported, and all its bytes lie
    /// inside the file: candle multiplies and adds what the file says without a check.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<&TensorInfo, ImportError> {
        use GgmlDType::{BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0};
        let info = self.content.tensor_infos.get(name).ok_or_else(|| self.wrong(format!("tensor {name} is missing")))?;
        if info.shape.dims() != shape {
            return Err(self.wrong(format!("tensor {name} has shape {:?}, expected {shape:?}", info.shape.dims())));
        }
        let dtype = info.ggml_dtype;
        if !matches!(dtype, F32 | F16 | BF16 | Q4_0 | Q4_1 | Q5_0 | Q5_1 | Q8_0) {
            return Err(self.wrong(format!(
                "tensor {name} is stored as {dtype:?}; supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0"
            )));
        }
        let (block, block_bytes) = (dtype.block_size() as u64, dtype.type_size() as u64);
        let elements = shape.iter().try_fold(1_u64, |product, &d| product.checked_mul(d as u64));
        let end = elements
            .filter(|n| *n > 0 && n.is_multiple_of(block))
            .and_then(|n| (n / block).checked_mul(block_bytes))
            .and_then(|bytes| bytes.checked_add(info.offset)?.checked_add(self.content.tensor_data_offset));
        match end {
            Some(end) if end <= self.length => Ok(info),
            _ => Err(self.wrong(format!("the bytes of tensor {name} do not lie inside the file; is it truncated?"))),
        }
    }
}

/// The shortest decimal that is this float32, as a float64.
fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or_else(|_| f64::from(value))
}

/// An error's first line: candle appends a backtrace where those are switched on.
fn reason(error: &candle_core::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// The Llama family's tensors under Hugging Face's names.
struct Llama<'a> {
    gguf: &'a Gguf,
    architecture: &'a Architecture,
}

impl TensorSource for Llama<'_> {
    fn dtype(&self, tensor: &ExpectedTensor) -> Result<Dtype, ImportError> {
        let (name, _) = gguf_name(&tensor.name).ok_or_else(|| self.gguf.wrong(format!("{} has no name in GGUF", tensor.name)))?;
        // Half-precision tensors stay as they are; quantised ones have no smaller exact form than float32.
        Ok(match self.gguf.checked(&name, &tensor.shape)?.ggml_dtype {
            GgmlDType::F16 => Dtype::F16,
            GgmlDType::BF16 => Dtype::BF16,
            _ => Dtype::F32,
        })
    }

    fn bytes(&self, tensor: &ExpectedTensor) -> Result<Cow<'_, [u8]>, ImportError> {
        let (name, rotary) =
            gguf_name(&tensor.name).ok_or_else(|| self.gguf.wrong(format!("{} has no name in GGUF", tensor.name)))?;
        let mut numbers = self.gguf.dequantized(&name, &tensor.shape)?;
        if rotary {
            numbers = unpermuted(&numbers, self.architecture.head_dim, self.architecture.hidden_size);
        }
        Ok(Cow::Owned(match self.dtype(tensor)? {
            Dtype::F16 => numbers.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect(),
            Dtype::BF16 => numbers.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect(),
            _ => numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
        }))
    }
}

/// llama.cpp's name for a tensor, and whether its rows are in llama.cpp's rotary order.
fn gguf_name(name: &str) -> Option<(String, bool)> {
    let plain = |name: &str| Some((name.to_owned(), false));
    match name {
        "model.embed_tokens.weight" => return plain("token_embd.weight"),
        "model.norm.weight" => return plain("output_norm.weight"),
        "lm_head.weight" => return plain("output.weight"),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (short, rotary) = match rest.strip_suffix(".weight")? {
        "input_layernorm" => ("attn_norm", false),
        "self_attn.q_proj" => ("attn_q", true),
        "self_attn.k_proj" => ("attn_k", true),
        "self_attn.v_proj" => ("attn_v", false),
        "self_attn.o_proj" => ("attn_output", false),
        "post_attention_layernorm" => ("ffn_norm", false),
        "mlp.gate_proj" => ("ffn_gate", false),
        "mlp.up_proj" => ("ffn_up", false),
        "mlp.down_proj" => ("ffn_down", false),
        _ => return None,
    };
    Some((format!("blk.{layer}.{short}.weight"), rotary))
}

/// llama.cpp rotates neighbouring rows of a head, Hugging Face rows half a head apart, so their converter reorders the rows
/// of queries and keys; this puts them back: row `2i + j` of a head returns to row `j * head_dim / 2 + i`.
fn unpermuted(numbers: &[f32], head_dim: usize, columns: usize) -> Vec<f32> {
    let half = head_dim / 2;
    let mut rows = Vec::with_capacity(numbers.len());
    for head in numbers.chunks(head_dim * columns) {
        for row in 0..head_dim {
            let from = 2 * (row % half) + row / half;
            rows.extend_from_slice(&head[from * columns..(from + 1) * columns]);
        }
    }
    rows
}

/// The most of a file that is taken for its header. Vocabularies of 256 thousand tokens need about 10 MiB.
const MAX_HEADER_BYTES: u64 = 32 * 1024 * 1024;

/// What candle's parser sees of a file: no further than `end`, so that every length the header claims is checked against a
/// bound that memory can hold; and no alignment of zero, by which it would divide.
struct Guard<R> {
    inner: R,
    end: u64,
    position: u64,
    seen: Seen,
}

/// How far into the entry `general.alignment` the parser has read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Seen {
    Other,
    Key,
    Type,
}

impl<R: Read + Seek> Guard<R> {
    fn new(mut inner: R, end: u64) -> io::Result<Self> {
        inner.seek(SeekFrom::Start(0))?;
        Ok(Self { inner, end, position: 0, seen: Seen::Other })
    }

    fn left(&self) -> u64 {
        self.end.saturating_sub(self.position)
    }
}

impl<R: Read + Seek> Read for Guard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left()).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.inner.read(&mut buffer[..most])?;
        self.position += read as u64;
        Ok(read)
    }

    fn read_exact(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        if buffer.len() as u64 > self.left() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.inner.read_exact(buffer)?;
        self.position += buffer.len() as u64;
        let is_key = buffer.strip_prefix(b"general.alignment").is_some_and(|rest| rest.iter().all(|b| *b == 0));
        self.seen = match (self.seen, buffer.len()) {
            _ if is_key => Seen::Key,
            (Seen::Key, 4) => Seen::Type,
            (Seen::Type, 1 | 2 | 4 | 8) if buffer.iter().all(|b| *b == 0) => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "general.alignment is 0"));
            }
            _ => Seen::Other,
        };
        Ok(())
    }
}

impl<R: Read + Seek> Seek for Guard<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(at) => at,
            SeekFrom::Current(by) => self.position.saturating_add_signed(by),
            SeekFrom::End(by) => self.end.saturating_add_signed(by),
        };
        self.position = self.inner.seek(SeekFrom::Start(target))?;
        Ok(self.position)
    }

    fn stream_position(&mut self) -> io::Result<u64> {
        Ok(self.position)
    }
}

#[cfg(test)]
mod tests;
