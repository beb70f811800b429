//! The fused loops against the same formulas as libtorch operations, in both kinds of numbers.

use super::*;

const KINDS: [(Kind, f64); 2] = [(Kind::Float, 1e-5), (Kind::BFloat16, 1e-2)];

fn random(shape: &[i64], kind: Kind) -> Tensor {
    Tensor::randn(shape, (Kind::Float, Device::Cpu)).to_kind(kind)
}

/// The largest difference against the largest expected number.
fn differs(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!((got.size(), got.kind()), (expected.size(), expected.kind()));
    let (got, expected) = (got.to_kind(Kind::Double), expected.to_kind(Kind::Double));
    (got - &expected).abs().max().double_value(&[]) / expected.abs().max().double_value(&[]).max(1e-9)
}

fn same(got: &[Tensor], expected: &[Tensor], bar: f64) {
    assert_eq!(got.len(), expected.len());
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let difference = differs(got, expected);
        assert!(difference < bar, "number {at} of {:?} differs by {difference}", got.kind());
    }
}

#[test]
fn norms_and_their_derivatives_are_those_of_the_formula() {
    for (kind, bar) in KINDS {
        let (x, by, also) = (random(&[7, 40], kind), random(&[7, 40], kind), random(&[7, 40], kind));
        let weight = random(&[40], Kind::Float);
        let (y, inverse) = rms_norm(&x, &weight, 1e-5);
        let (y_expected, inverse_expected) = composed::rms_norm(&x, &weight, 1e-5);
        same(&[y, inverse.shallow_clone()], &[y_expected, inverse_expected], bar);
        for also in [None, Some(&also)] {
            let got = rms_norm_backward(&by, &x, &inverse, &weight, also);
            same(&[got], &[composed::rms_norm_backward(&by, &x, &inverse, &weight, also)], bar);
        }
    }
}

#[test]
fn heads_are_split_turned_and_joined_as_the_formula_says_also_in_rows_of_different_lengths() {
    let rows = Rows::new(&[5, 2, 4], Device::Cpu);
    let rotary = Rotary::new(&random(&[4], Kind::Float), 5);
    for (kind, bar) in KINDS {
        let norms = [random(&[8], Kind::Float), random(&[8], Kind::Float)];
        for norms in [None, Some([&norms[0], &norms[1]])] {
            let shape = HeadShape { heads: 6, shared: 2, head_dim: 8, norms, epsilon: 1e-6 };
            let qkv = random(&[11, 80], kind);
            let got = split_heads(&qkv, &rows, &rotary, shape);
            same(&got, &composed::split_heads(&qkv, &rows, &rotary, shape), bar);

            let by = [random(&[3, 2, 5, 3, 8], kind), random(&[3, 2, 5, 8], kind), random(&[3, 2, 5, 8], kind)];
            let by = [&by[0], &by[1], &by[2]];
            let got = split_heads_backward(by, Some(&qkv), &rows, &rotary, shape, 11);
            same(&[got], &[composed::split_heads_backward(by, Some(&qkv), &rows, &rotary, shape)], bar);

            let packed = random(&[11, 48], kind);
            let spread = join_heads_backward(&packed, &rows, shape);
            same(&[spread.shallow_clone()], &[composed::join_heads_backward(&packed, &rows, shape)], 1e-9);
            let joined = join_heads(&spread, &rows, shape, 11);
            same(&[joined.shallow_clone()], &[composed::join_heads(&spread, &rows, shape)], 1e-9);
            assert_eq!(joined, packed);
        }
    }
}

#[test]
fn attention_sees_what_its_block_says_and_its_derivative_is_that_of_the_formula() {
    let rows = Rows::new(&[6, 3, 5], Device::Cpu);
    let blocks = [(0, i64::MAX), (0, 2), (2, 3)];
    for (kind, bar) in KINDS {
        for (first_query, window) in blocks {
            let first_key = (first_query + 1_i64).saturating_sub(window).max(0);
            let block = Block { group: 2, first_query, first_key, window, scale: 0.3, first_row: 1, rows: 2 };
            let (queries, keys) = (6 - first_query, 6 - first_key);
            let scores = random(&[4, 2 * queries, keys], Kind::Float) * 5.0;
            let p = attention_softmax(&scores, &rows, block, kind);
            same(&[p], &[composed::attention_softmax(&scores, &rows, block, kind)], bar);
            let by = random(&[4, 2 * queries, keys], kind);
            let expected = composed::attention_softmax_backward(&by, &scores, &rows, block);
            same(&attention_softmax_backward(by.copy(), &scores, &rows, block), &expected, bar);
        }
    }
}

#[test]
fn gates_and_their_derivatives_are_those_of_the_formula() {
    for (kind, bar) in KINDS {
        for activation in [Activation::Silu, Activation::GeluTanh] {
            let (gate_up, by) = (random(&[5, 24], kind) * 3.0, random(&[5, 12], kind));
            same(&[gated(&gate_up, activation)], &[composed::gated(&gate_up, activation)], bar);
            let expected = composed::gated_backward(&gate_up, &by, activation);
            same(&gated_backward(&gate_up, &by, activation), &expected, bar);
        }
    }
}

#[test]
fn losses_and_their_derivatives_are_those_of_the_formula() {
    for (kind, bar) in KINDS {
        for cap in [None, Some(5.0)] {
            let (logits, base) = (random(&[6, 2000], kind) * 4.0, random(&[6, 2000], kind) * 4.0);
            let targets = Tensor::randint(2000, [6], (Kind::Int64, Device::Cpu));
            let expected = composed::cross_entropy(&logits, &targets, cap);
            let got = cross_entropy(logits.copy(), &targets, cap);
            same(&[got.loss, got.derivative], &[expected.loss, expected.derivative], bar);
            assert_eq!(got.correct, expected.correct);
            let expected = composed::divergence(&logits, &base, cap);
            let got = divergence(logits.copy(), &base, cap);
            same(&[got.loss, got.derivative], &[expected.loss, expected.derivative], bar);
        }
    }
}

#[test]
fn the_token_that_ranks_first_counts_as_correct() {
    let logits = Tensor::from_slice2(&[[0.0_f32, 3.0, 1.0], [2.0, 0.0, 1.0]]);
    let got = cross_entropy(logits, &Tensor::from_slice(&[1_i64, 2]), None);
    assert_eq!(Vec::<i64>::try_from(&got.correct).expect("whole numbers"), [1, 0]);
}

#[test]
fn logits_that_are_not_numbers_give_a_loss_that_is_none() {
    let logits = Tensor::from_slice2(&[[0.0_f32, f32::NAN, 1.0]]);
    let loss = cross_entropy(logits, &Tensor::from_slice(&[0_i64]), None).loss;
    assert!(loss.double_value(&[0]).is_nan());
}

#[test]
fn dropout_is_a_function_of_key_place_and_column_alone_and_keeps_the_share_it_says() {
    let x = Tensor::ones([200, 50], (Kind::Float, Device::Cpu));
    let places = (Tensor::arange(200, (Kind::Int64, Device::Cpu)) * 3) + (5_i64 << 32);
    let whole = dropout(&x, 99, &places, 0.3);
    assert_eq!(whole, composed::dropout(&x, 99, &places, 0.3), "another device drops others");
    let second = dropout(&x.narrow(0, 100, 100), 99, &places.narrow(0, 100, 100), 0.3);
    assert_eq!(whole.narrow(0, 100, 100), second, "a pass that begins elsewhere drops others");
    assert_ne!(whole, dropout(&x, 98, &places, 0.3));
    assert!((whole.mean(Kind::Double).double_value(&[]) - 1.0).abs() < 0.02);
    let kept = whole.gt(0.0).to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
    assert!((kept - 0.7).abs() < 0.02, "{kept}");
}

#[test]
fn outer_products_are_summed_in_float32_also_over_parts_of_rows() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for (rank, width) in [(8, 96), (20, 70), (3, 32), (150, 64)] {
            let (low, wide) = (random(&[150, rank + 5], kind), random(&[150, width + 9], kind));
            let (low, wide) = (low.narrow(1, 2, rank), wide.narrow(1, 4, width));
            same(&[outer_sum(&low, &wide)], &[composed::outer_sum(&low, &wide)], 1e-5);
        }
    }
}

#[test]
fn inner_products_are_summed_in_float64() {
    let x = random(&[100_003], Kind::Float);
    assert!((inner_product(&x, &x) - composed::inner_product(&x, &x)).abs() < 1e-6);
    let large = Tensor::from_slice(&[1e8_f32, 1.0, -1e8]);
    let ones = Tensor::ones([3], (Kind::Float, Device::Cpu));
    assert!((inner_product(&large, &ones) - 1.0).abs() < f64::EPSILON);
}
