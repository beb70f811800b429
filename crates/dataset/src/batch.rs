//! Examples to the rows of one forward pass.

use crate::Example;

/// Rows packed one behind the other. Under causal attention a row's padding never reaches its tokens, so none is kept: what
/// pads is up to whoever needs a rectangle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Tokens of each row.
    pub lengths: Vec<usize>,
    /// Token ids of all rows, `[Σ lengths]`.
    pub ids: Vec<i64>,
    /// Where a supervised token is predicted, as an index into `ids`, ascending. The token after it is the one predicted there.
    pub positions: Vec<i64>,
    /// The token predicted at each of them.
    pub targets: Vec<i64>,
}

impl Batch {
    /// Packs `examples`.
    #[must_use]
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut batch = Self { lengths: Vec::new(), ids: Vec::new(), positions: Vec::new(), targets: Vec::new() };
        for example in examples {
            for (time, (&id, &supervised)) in example.ids.iter().zip(&example.supervised).enumerate() {
                if supervised && time > 0 {
                    batch.positions.push(batch.ids.len() as i64 - 1);
                    batch.targets.push(i64::from(id));
                }
                batch.ids.push(i64::from(id));
            }
            batch.lengths.push(example.ids.len());
        }
        batch
    }

    /// Packs `examples` after padding each to the longest with tokens of id 0, which then count as tokens.
    #[must_use]
    pub fn padded<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut examples: Vec<Example> = examples.into_iter().cloned().collect();
        let width = examples.iter().map(|example| example.ids.len()).max().unwrap_or(0);
        for example in &mut examples {
            example.ids.resize(width, 0);
            example.supervised.resize(width, false);
        }
        Self::new(&examples)
    }

    /// The same rows with every token as a position, and no targets.
    #[must_use]
    pub fn everywhere(mut self) -> Self {
        self.positions = (0..self.ids.len() as i64).collect();
        self.targets.clear();
        self
    }

    /// Tokens.
    #[must_use]
    pub fn tokens(&self) -> u64 {
        self.ids.len() as u64
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
        assert_eq!((batch.lengths.as_slice(), batch.tokens()), ([3, 2].as_slice(), 5));
        assert_eq!(batch.ids, [5, 6, 7, 8, 9]);
        assert_eq!(batch.positions, [1, 3]);
        assert_eq!(batch.targets, [7, 9]);
    }

    #[test]
    fn the_first_token_of_a_row_is_predicted_from_nothing() {
        assert!(Batch::new(&[example(&[5], &[1])]).positions.is_empty());
    }

    #[test]
    fn padding_makes_every_row_as_long_as_the_longest() {
        let batch = Batch::padded(&[example(&[5, 6, 7], &[0, 0, 1]), example(&[8, 9], &[0, 1])]);
        assert_eq!((batch.lengths.as_slice(), batch.ids.as_slice()), ([3, 3].as_slice(), [5, 6, 7, 8, 9, 0].as_slice()));
        assert_eq!(batch.positions, [1, 3]);
    }
}
