//! Rows as a pass takes them.

use holdfast_dataset::batch::Batch;
use tch::{Device, Tensor};

use crate::kernels::Rows;

/// The rows of a pass, one behind the other without padding.
#[derive(Debug)]
pub struct Packed {
    /// Token ids, `[tokens]`.
    pub ids: Tensor,
    /// How the tokens make up rows.
    pub rows: Rows,
    /// The tokens whose final hidden states are asked for, in ascending order, `[positions]`.
    pub positions: Tensor,
    /// Each token's place in its step, row and time, which decides what dropout drops; on the CPU, `[tokens]`.
    pub places: Tensor,
}

impl Packed {
    /// The rows of `batches`, one batch behind the other, asking for their positions. Each batch comes with the
    /// number its first row has within the step, so that how a step is cut into passes makes no difference to what is dropped.
    #[must_use]
    pub fn new(batches: &[(&Batch, i64)], device: Device) -> Self {
        let (mut ids, mut lengths, mut positions, mut places) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for (batch, first_row) in batches {
            let before = ids.len() as i64;
            ids.extend_from_slice(&batch.ids);
            positions.extend(batch.positions.iter().map(|position| before + position));
            for (row, &length) in (*first_row..).zip(&batch.lengths) {
                places.extend((0..length as i64).map(|time| row << 32 | time));
            }
            lengths.extend_from_slice(&batch.lengths);
        }
        Self {
            ids: Tensor::from_slice(&ids).to_device(device),
            rows: Rows::new(&lengths, device),
            positions: Tensor::from_slice(&positions).to_device(device),
            places: Tensor::from_slice(&places),
        }
    }
}
