//! The losses, at the positions asked for only and in chunks, so that the rectangle of tokens and vocabulary never exists.
//!
//! Each is the sum over positions, and comes with its derivative by the hidden states. Softmax and its logarithm are taken in
//! float32 whatever the model computes in.

use holdfast_base_model::memory::positions_at_once;
use tch::{Kind, Tensor};

use crate::head::Head;
use crate::kernels::{self, ByLogits};
use crate::product;

/// A loss over some positions.
#[derive(Debug)]
pub struct Loss {
    /// At each position, in nats, `[positions]` float32.
    pub at: Tensor,
    /// Positions where the target is what the model ranks first; 0 for the KL, which has no target.
    pub correct: i64,
    /// The derivative of each position's loss by its hidden state, `[positions, hidden]`.
    pub by_hidden: Tensor,
}

impl Loss {
    /// The sum over the positions.
    #[must_use]
    pub fn sum(&self) -> f64 {
        self.at.sum(Kind::Double).double_value(&[])
    }

    /// The derivative of the sum over `divisor`.
    pub fn mean_by_hidden(self, divisor: f64) -> Tensor {
        let mut by_hidden = self.by_hidden;
        by_hidden /= divisor;
        by_hidden
    }
}

/// `−log p(target | ..)`: `∂/∂logits = softmax − onehot`.
///
/// `hidden: [positions, hidden]`, `targets: [positions]`.
#[must_use]
pub fn task(hidden: &Tensor, head: &Head, targets: &Tensor) -> Loss {
    in_chunks(hidden, head, |start, length, logits| {
        kernels::cross_entropy(logits, &targets.narrow(0, start, length), head.softcap)
    })
}

/// `KL(base ‖ adapted)`: `∂/∂logits = softmax(adapted) − softmax(base)`.
///
/// `base` are the base's final hidden states at the same positions; the frozen `head` makes its logits from them again, which
/// is exact and holds `hidden` numbers a position where logits would hold a vocabulary.
#[must_use]
pub fn kl(hidden: &Tensor, head: &Head, base: &Tensor) -> Loss {
    in_chunks(hidden, head, |start, length, logits| {
        kernels::divergence(logits, &head.products(&base.narrow(0, start, length)), head.softcap)
    })
}

/// Runs `each(start, length, logits)` over chunks of positions.
fn in_chunks(hidden: &Tensor, head: &Head, each: impl Fn(i64, i64, Tensor) -> ByLogits) -> Loss {
    let positions = hidden.size().first().copied().unwrap_or(0);
    let chunk = positions_at_once(head.matrix.size()[0].cast_unsigned()).cast_signed();
    let (by_hidden, mut at, mut correct) = (hidden.empty_like(), Vec::new(), 0);
    for start in (0..positions).step_by(usize::try_from(chunk).unwrap_or(1)) {
        let length = chunk.min(positions - start);
        let found = each(start, length, head.products(&hidden.narrow(0, start, length))); // [chunk, vocabulary]
        by_hidden.narrow(0, start, length).copy_(&product::backward(&found.derivative, &head.matrix));
        at.push(found.loss);
        correct += found.correct.sum(Kind::Int64).int64_value(&[]);
    }
    let at = if at.is_empty() { Tensor::zeros([0], (Kind::Float, hidden.device())) } else { Tensor::cat(&at, 0) };
    Loss { at, correct, by_hidden }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Tensor};

    use super::*;

    /// More positions than a chunk takes.
    const VOCABULARY: i64 = 300;
    const POSITIONS: i64 = 1030;

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    fn largest_difference(x: &Tensor, y: &Tensor) -> f64 {
        (x - y).abs().max().double_value(&[])
    }

    fn head(softcap: Option<f64>) -> Head {
        Head { matrix: random(&[VOCABULARY, 3]), softcap }
    }

    /// By autograd over the whole rectangle.
    fn by_autograd(hidden: &Tensor, loss: impl Fn(&Tensor) -> Tensor) -> (f64, Tensor) {
        let hidden = hidden.detach().set_requires_grad(true);
        let whole = loss(&hidden);
        let mut by_hidden = Tensor::run_backward(&[&whole], &[&hidden], false, false);
        (whole.double_value(&[]), by_hidden.remove(0))
    }

    #[test]
    fn the_task_loss_and_its_derivative_equal_autograd_over_the_whole_rectangle() {
        for softcap in [None, Some(2.0)] {
            let (hidden, head) = (random(&[POSITIONS, 3]), head(softcap));
            let targets = Tensor::randint(VOCABULARY, [POSITIONS], (Kind::Int64, Device::Cpu));
            let (sum, by_hidden) =
                by_autograd(&hidden, |hidden| head.logits(hidden).cross_entropy_for_logits(&targets) * POSITIONS as f64);
            let loss = task(&hidden, &head, &targets);
            assert!((loss.sum() / sum - 1.0).abs() < 1e-5);
            assert!(largest_difference(&loss.by_hidden, &by_hidden) < 1e-5);
        }
    }

    #[test]
    fn the_kl_and_its_derivative_equal_autograd_over_the_whole_rectangle() {
        for softcap in [None, Some(2.0)] {
            let (hidden, base, head) = (random(&[POSITIONS, 3]), random(&[POSITIONS, 3]), head(softcap));
            let log_p = |hidden: &Tensor| head.logits(hidden).log_softmax(-1, Kind::Float);
            let whole = |hidden: &Tensor| (log_p(&base).exp() * (log_p(&base) - log_p(hidden))).sum(Kind::Float);
            let (sum, by_hidden) = by_autograd(&hidden, whole);
            let loss = kl(&hidden, &head, &base);
            assert!((loss.sum() / sum - 1.0).abs() < 1e-5);
            assert!(largest_difference(&loss.by_hidden, &by_hidden) < 1e-5);
        }
    }

    #[test]
    fn the_kl_of_a_model_to_itself_is_zero_and_has_no_slope() {
        let (hidden, head) = (random(&[3, 3]), head(None));
        let loss = kl(&hidden, &head, &hidden);
        assert_eq!((loss.sum(), loss.by_hidden.abs().max().double_value(&[])), (0.0, 0.0));
    }
}
