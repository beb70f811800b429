//! Examples to the rectangles a model reads.

use crate::Example;

/// Rows of equal width, padded on the right. Under causal attention a padded position never reaches a real one, so no mask
/// goes with it: what matters is only where the loss is taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Rows.
    pub rows: usize,
    /// Tokens in each, padding counted.
    pub width: usize,
    /// Token ids, `[rows, width]` in row-major order; 0 where padded.
    pub ids: Vec<i64>,
    /// Where a supervised token is predicted, as `row * width + time`. The token at `time + 1` is the one predicted there.
    pub positions: Vec<i64>,
    /// The token predicted at each of them.
    pub targets: Vec<i64>,
    /// Tokens without the padding.
    pub tokens: usize,
}

impl Batch {
    /// Pads `examples` to the longest of them.
    #[must_use]
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let examples: Vec<&Example> = examples.into_iter().collect();
        let width = examples.iter().map(|e| e.ids.len()).max().unwrap_or(0);
        let mut batch = Self {
            rows: examples.len(),
            width,
            ids: vec![0; examples.len() * width],
            positions: Vec::new(),
            targets: Vec::new(),
            tokens: 0,
        };
        for (row, example) in examples.iter().enumerate() {
            batch.tokens += example.ids.len();
            for (time, (&id, &supervised)) in example.ids.iter().zip(&example.supervised).enumerate() {
                let at = row * width + time;
                batch.ids[at] = i64::from(id);
                if supervised && time > 0 {
                    batch.positions.push(at as i64 - 1);
                    batch.targets.push(i64::from(id));
                }
            }
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(ids: &[u32], supervised: &[u8]) -> Example {
        Example { ids: ids.to_vec(), supervised: supervised.iter().map(|s| *s == 1).collect() }
    }

    #[test]
    fn the_position_before_a_supervised_token_predicts_it() {
        let batch = Batch::new(&[example(&[5, 6, 7], &[0, 0, 1]), example(&[8, 9], &[0, 1])]);
        assert_eq!((batch.rows, batch.width, batch.tokens), (2, 3, 5));
        assert_eq!(batch.ids, [5, 6, 7, 8, 9, 0]);
        assert_eq!(batch.positions, [1, 3]);
        assert_eq!(batch.targets, [7, 9]);
    }

    #[test]
    fn the_first_token_of_a_row_is_predicted_from_nothing() {
        assert!(Batch::new(&[example(&[5], &[1])]).positions.is_empty());
    }
}
