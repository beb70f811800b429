//! The output matrix.

use tch::{Kind, Tensor};

/// What turns final hidden states into logits.
#[derive(Debug)]
pub struct Head {
    /// `[vocabulary, hidden]`.
    pub matrix: Tensor,
    /// Logits `l` become `c · tanh(l / c)`, where set.
    pub softcap: Option<f64>,
}

impl Head {
    /// Logits in float32, `[.., vocabulary]`, of final hidden states `[.., hidden]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let logits = hidden.linear(&self.matrix, None::<&Tensor>);
        match self.softcap {
            Some(cap) => (logits.to_kind(Kind::Float) / cap).tanh() * cap,
            None => logits.to_kind(Kind::Float),
        }
    }

    /// `log p`, `[.., vocabulary]`, in float32.
    pub fn log_softmax(&self, hidden: &Tensor) -> Tensor {
        match self.softcap {
            Some(_) => self.logits(hidden).log_softmax(-1, Kind::Float),
            // Softmax widens by itself, so the logits need not exist in float32.
            None => hidden.linear(&self.matrix, None::<&Tensor>).log_softmax(-1, Kind::Float),
        }
    }

    /// From a derivative by the logits to the one by the hidden states they were made from.
    pub fn backward(&self, hidden: &Tensor, by_logits: &Tensor) -> Tensor {
        let by_product = match self.softcap {
            // d/dl c·tanh(l / c) = 1 − tanh²(l / c)
            Some(cap) => by_logits * (1.0 - (self.logits(hidden) / cap).square()),
            None => by_logits.shallow_clone(),
        };
        by_product.to_kind(self.matrix.kind()).matmul(&self.matrix)
    }
}
