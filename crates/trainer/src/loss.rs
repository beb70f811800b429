//! The two losses, at supervised positions only and in chunks, so that the rectangle of tokens and vocabulary never exists.
//!
//! Each function returns the loss's sum and its derivative by the hidden states. Softmax and its logarithm are taken in
//! float32 whatever the model computes in.

use tch::{Kind, Tensor};

use crate::head::Head;

/// Positions whose logits exist at one time: 256 of them over 128,000 tokens are 131 MB.
const CHUNK: usize = 256;

/// A loss over some positions.
#[derive(Debug)]
pub struct Loss {
    /// The sum over the positions, in nats.
    pub sum: f64,
    /// Positions where the target is what the model ranks first; 0 for the KL, which has no target.
    pub correct: i64,
    /// The derivative of `sum / divisor` by the hidden states, `[positions, hidden]`.
    pub by_hidden: Tensor,
}

/// `−log p(target | ..)` summed over positions: `∂/∂logits = softmax − onehot`.
///
/// `hidden: [positions, hidden]`, `targets: [positions]`.
#[must_use]
pub fn task(hidden: &Tensor, head: &Head, targets: &Tensor, divisor: f64) -> Loss {
    in_chunks(hidden, head, divisor, |at, length, log_p| {
        let targets = targets.narrow(0, at, length).unsqueeze(1); // [chunk, 1]
        let sum = -log_p.gather(1, &targets, false).sum(Kind::Double).double_value(&[]);
        let correct = log_p.argmax(1, true).eq_tensor(&targets).sum(Kind::Int64).int64_value(&[]);
        let minus_one = Tensor::full_like(&targets.to_kind(Kind::Float), -1.0);
        (sum, correct, log_p.exp().scatter_add(1, &targets, &minus_one))
    })
}

/// `KL(base ‖ adapted)` summed over positions: `∂/∂logits = softmax(adapted) − softmax(base)`.
///
/// `base` are the base's final hidden states at the same positions; the frozen `head` makes its logits from them again, which
/// is exact and holds `hidden` numbers a position where logits would hold a vocabulary.
#[must_use]
pub fn kl(hidden: &Tensor, head: &Head, base: &Tensor, divisor: f64) -> Loss {
    in_chunks(hidden, head, divisor, |at, length, log_p| {
        let base_log_p = head.log_softmax(&base.narrow(0, at, length));
        let base_p = base_log_p.exp();
        let sum = (&base_p * (base_log_p - &log_p)).sum(Kind::Double).double_value(&[]);
        (sum, 0, log_p.exp() - base_p)
    })
}

/// Runs `each(start, length, log_p)`, which returns a chunk's sum, its correct positions and its derivative by the logits.
fn in_chunks(hidden: &Tensor, head: &Head, divisor: f64, each: impl Fn(i64, i64, Tensor) -> (f64, i64, Tensor)) -> Loss {
    tch::no_grad(|| {
        let hidden = hidden.detach();
        let (positions, chunk) = (hidden.size()[0], CHUNK as i64);
        let by_hidden = hidden.empty_like();
        let (mut sum, mut correct) = (0.0, 0);
        for at in (0..positions).step_by(CHUNK) {
            let length = chunk.min(positions - at);
            let chunk = hidden.narrow(0, at, length);
            let (chunk_sum, chunk_correct, by_logits) = each(at, length, head.log_softmax(&chunk)); // [chunk, vocabulary]
            sum += chunk_sum;
            correct += chunk_correct;
            by_hidden.narrow(0, at, length).copy_(&head.backward(&chunk, &(by_logits / divisor)));
        }
        Loss { sum, correct, by_hidden }
    })
}

#[cfg(test)]
mod tests {
    use tch::{Device, Tensor};

    use super::*;

    fn random(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, Device::Cpu))
    }

    fn largest_difference(x: &Tensor, y: &Tensor) -> f64 {
        (x - y).abs().max().double_value(&[])
    }

    fn plain(matrix: &Tensor) -> Head {
        Head { matrix: matrix.shallow_clone(), softcap: None }
    }

    #[test]
    fn a_capped_logit_s_slope_is_part_of_the_derivative() {
        tch::manual_seed(3);
        let (hidden, matrix) = (random(&[5, 6]).set_requires_grad(true), random(&[11, 6]));
        let targets = Tensor::randint(11, [5], (Kind::Int64, Device::Cpu));
        let whole = ((hidden.matmul(&matrix.tr()) / 2.0).tanh() * 2.0).cross_entropy_for_logits(&targets);
        let expected = Tensor::run_backward(&[&whole], &[&hidden], false, false);
        let loss = task(&hidden, &Head { matrix, softcap: Some(2.0) }, &targets, 5.0);
        assert!((loss.sum / 5.0 - whole.double_value(&[])).abs() < 1e-5);
        assert!(largest_difference(&loss.by_hidden, &expected[0]) < 1e-6);
    }

    #[test]
    fn the_task_loss_and_its_derivative_equal_autograd_over_the_whole_rectangle() {
        tch::manual_seed(1);
        let positions = CHUNK as i64 + 7;
        let (hidden, head) = (random(&[positions, 6]).set_requires_grad(true), random(&[11, 6]));
        let targets = Tensor::randint(11, [positions], (Kind::Int64, Device::Cpu));
        let whole = hidden.matmul(&head.tr()).cross_entropy_for_logits(&targets);
        let expected = Tensor::run_backward(&[&whole], &[&hidden], false, false);
        let loss = task(&hidden, &plain(&head), &targets, positions as f64);
        assert!((loss.sum / positions as f64 - whole.double_value(&[])).abs() < 1e-5);
        assert!(largest_difference(&loss.by_hidden, &expected[0]) < 1e-6);
    }

    #[test]
    fn the_kl_and_its_derivative_equal_autograd_over_the_whole_rectangle() {
        tch::manual_seed(2);
        let positions = CHUNK as i64 + 7;
        let (hidden, base, head) = (random(&[positions, 6]).set_requires_grad(true), random(&[positions, 6]), random(&[11, 6]));
        let log_p = |h: &Tensor| h.matmul(&head.tr()).log_softmax(-1, Kind::Float);
        let whole = (log_p(&base).exp() * (log_p(&base) - log_p(&hidden))).sum(Kind::Float) / positions as f64;
        let expected = Tensor::run_backward(&[&whole], &[&hidden], false, false);
        let loss = kl(&hidden, &plain(&head), &base, positions as f64);
        assert!((loss.sum / positions as f64 - whole.double_value(&[])).abs() < 1e-5);
        assert!(largest_difference(&loss.by_hidden, &expected[0]) < 1e-6);
    }

    #[test]
    fn the_kl_of_a_model_to_itself_is_zero_and_has_no_slope() {
        let (hidden, head) = (random(&[3, 6]), random(&[11, 6]));
        let loss = kl(&hidden, &plain(&head), &hidden, 3.0);
        assert_eq!((loss.sum, loss.by_hidden.abs().max().double_value(&[])), (0.0, 0.0));
    }

    #[test]
    fn a_position_counts_as_correct_where_the_target_ranks_first() {
        let head = Tensor::eye(3, (Kind::Float, Device::Cpu));
        let hidden = Tensor::from_slice2(&[[9.0_f32, 0.0, 0.0], [0.0, 9.0, 0.0]]);
        let loss = task(&hidden, &plain(&head), &Tensor::from_slice(&[0_i64, 2]), 2.0);
        assert_eq!(loss.correct, 1);
    }
}
