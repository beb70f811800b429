//! The output matrix.

use tch::{Kind, Tensor};

use crate::product;

/// What turns final hidden states into logits.
#[derive(Debug)]
pub struct Head {
    /// `[vocabulary, hidden]`.
    pub matrix: Tensor,
    /// Products `l` become the logits `c · tanh(l / c)`, where set.
    pub softcap: Option<f64>,
}

impl Head {
    /// The matrix's products with final hidden states `[positions, hidden]`, in the model's numbers, before they are capped:
    /// `[positions, vocabulary]`.
    pub fn products(&self, hidden: &Tensor) -> Tensor {
        product::forward(hidden, &self.matrix, None)
    }

    /// Logits in float32, `[positions, vocabulary]`, of final hidden states `[positions, hidden]`.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        let logits = self.products(hidden).to_kind(Kind::Float);
        match self.softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }
}
