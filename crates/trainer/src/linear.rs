//! A frozen linear map with its LoRA: `y = W x + (α / r) · B A x`, forward and backward.
//!
//! Projections that read the same input are stacked, so that one product computes them; so are their `A`s. The products with
//! `A` and `B` are small and add onto the large one's result in place.

use std::ops::Range;

use holdfast_domain::hyperparameters::Projection;
use tch::Tensor;

use crate::adapter::Patch;
use crate::gradient::Gradient;
use crate::kernels;
use crate::product;

/// Projections that read the same input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stack {
    /// Queries, keys and values.
    Qkv,
    /// Attention's output.
    Output,
    /// The feed-forward's gate and its other half.
    GateUp,
    /// The feed-forward's output.
    Down,
}

impl Stack {
    /// All four, in the order a layer applies them.
    pub const ALL: [Self; 4] = [Self::Qkv, Self::Output, Self::GateUp, Self::Down];

    /// What is stacked, in order.
    #[must_use]
    pub const fn projections(self) -> &'static [Projection] {
        match self {
            Self::Qkv => &[Projection::QProj, Projection::KProj, Projection::VProj],
            Self::Output => &[Projection::OProj],
            Self::GateUp => &[Projection::GateProj, Projection::UpProj],
            Self::Down => &[Projection::DownProj],
        }
    }
}

/// The frozen weights of a stack.
#[derive(Debug)]
pub(crate) struct Weight {
    /// `[Σ out, in]`.
    pub(crate) matrix: Tensor,
    /// `[Σ out]`.
    pub(crate) bias: Option<Tensor>,
}

/// Which elements of an adapter's inputs are dropped.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dropout<'a> {
    pub(crate) share: f64,
    pub(crate) key: u64,
    /// Each token's place in its step, `[tokens]` int64.
    pub(crate) places: &'a Tensor,
}

impl Dropout<'_> {
    fn apply(&self, x: &Tensor, layer: usize, projection: Projection) -> Tensor {
        let module = (layer as u64) << 8 | projection as u64;
        kernels::dropout(x, self.key ^ module.wrapping_mul(0x9e37_79b9_7f4a_7c15), self.places, self.share)
    }
}

/// A stack as a pass computes it.
#[derive(Debug)]
pub(crate) struct Linear<'a> {
    pub(crate) weight: &'a Weight,
    pub(crate) patch: Option<Patch<'a>>,
    pub(crate) dropout: Option<Dropout<'a>>,
}

impl Linear<'_> {
    /// `y = W x`, its LoRA and `onto` added, `[tokens, Σ out]`; and the LoRA's `(α / r) A x`, which the backward pass needs,
    /// `[tokens, Σ r]`.
    pub(crate) fn forward(&self, x: &Tensor, onto: Option<&Tensor>) -> (Tensor, Option<Tensor>) {
        // A map that adds onto the stream has no bias in any family.
        let y = product::forward(x, &self.weight.matrix, onto.or(self.weight.bias.as_ref()));
        let Some((patch, low)) = self.patch.as_ref().zip(self.low(x)) else { return (y, None) };
        for (member, up) in patch.members() {
            let mut columns = y.narrow(1, member.first_column, member.columns);
            let _ = columns.addmm_(&patch.of_member(&low, member), &up.tr());
        }
        (y, Some(low))
    }

    /// The LoRA's `(α / r) A x` alone.
    pub(crate) fn low(&self, x: &Tensor) -> Option<Tensor> {
        let patch = self.patch.as_ref()?;
        let scale = patch.scale();
        let Some(dropout) = &self.dropout else { return Some(x.mm(&patch.down.tr()) * scale) };
        let parts: Vec<Tensor> = patch
            .members()
            .map(|(member, _)| dropout.apply(x, patch.layer, member.projection).mm(&patch.down_of(member).tr()) * scale)
            .collect();
        Some(Tensor::cat(&parts, 1))
    }

    /// The derivative by `x`, unless nothing before it learns, and by the LoRA's `A x`.
    pub(crate) fn backward(&self, by_y: &Tensor, needs_input: bool) -> (Option<Tensor>, Option<Tensor>) {
        let mut by_x = needs_input.then(|| product::backward(by_y, &self.weight.matrix));
        let Some(patch) = &self.patch else { return (by_x, None) };
        let parts: Vec<Tensor> = patch
            .members()
            .map(|(member, up)| by_y.narrow(1, member.first_column, member.columns).mm(up) * patch.scale())
            .collect();
        let by_low = Tensor::cat(&parts, 1);
        if let Some(by_x) = &mut by_x {
            match &self.dropout {
                None => drop(by_x.addmm_(&by_low, &patch.down)),
                Some(dropout) => {
                    for (member, _) in patch.members() {
                        let through = patch.of_member(&by_low, member).mm(&patch.down_of(member));
                        *by_x += dropout.apply(&through, patch.layer, member.projection);
                    }
                }
            }
        }
        (by_x, Some(by_low))
    }

    /// Adds the derivatives by `A` and `B` of each of `parts`, ranges of tokens, to its gradient.
    pub(crate) fn accumulate(
        &self,
        x: &Tensor,
        low: Option<&Tensor>,
        by_y: &Tensor,
        by_low: Option<&Tensor>,
        parts: &[Range<i64>],
        gradients: &mut [Gradient],
    ) {
        let (Some(patch), Some(low), Some(by_low)) = (&self.patch, low, by_low) else { return };
        let dropped: Option<Vec<Tensor>> = self
            .dropout
            .as_ref()
            .map(|dropout| patch.members().map(|(member, _)| dropout.apply(x, patch.layer, member.projection)).collect());
        for (part, gradient) in parts.iter().zip(gradients) {
            let (start, length) = (part.start, part.end - part.start);
            if length == 0 {
                continue;
            }
            let rows = |x: &Tensor| x.narrow(0, start, length);
            match &dropped {
                None => gradient.add(patch.down_range(), &kernels::outer_sum(&rows(by_low), &rows(x))),
                Some(dropped) => {
                    for ((member, _), dropped) in patch.members().zip(dropped) {
                        let by_down = kernels::outer_sum(&rows(&patch.of_member(by_low, member)), &rows(dropped));
                        gradient.add(member.down.clone(), &by_down);
                    }
                }
            }
            for (member, _) in patch.members() {
                let by_columns = rows(by_y).narrow(1, member.first_column, member.columns);
                let by_up = kernels::outer_sum(&rows(&patch.of_member(low, member)), &by_columns).tr();
                gradient.add(member.up.clone(), &by_up);
            }
        }
    }
}
