//! The large matrix products: of rows with weights as they are stored, `[out, in]`, and of attention's blocks.
//!
//! In float32 on a CPU they go to oneDNN as convolutions over single points, over the same memory and exact to the same rounding:
//! libtorch has no other way to it in float32, and what it would take instead is slower (`bench/RESULTS.md` says by how much).

use tch::{Device, Kind, Tensor};

use crate::kernels;

/// Products smaller than this, in multiplications, gain nothing by the detour.
const LEAST: i64 = 1 << 23;

/// Whether a product of tensors like `x`, over three such sizes, is better off alone than in a batch: on a CPU, where one as
/// large as this keeps all threads busy.
pub(crate) fn is_large(x: &Tensor, rows: i64, columns: i64, depth: i64) -> bool {
    x.device() == Device::Cpu && rows * columns * depth >= LEAST
}

fn as_convolution(x: &Tensor, matrix: &Tensor) -> bool {
    let size = matrix.size();
    is_large(x, x.size()[0], size[0], size[1]) && x.kind() == Kind::Float && x.is_contiguous() && matrix.is_contiguous()
}

/// `[tokens, width]` as an image of one column, channels last; a view.
fn image(x: &Tensor) -> Tensor {
    let size = x.size();
    x.view([1, size[0], 1, size[1]]).permute([0, 3, 1, 2])
}

fn rows(image: &Tensor) -> Tensor {
    let size = image.size();
    image.permute([0, 2, 3, 1]).reshape([size[2], size[1]])
}

fn filter(matrix: &Tensor) -> Tensor {
    let size = matrix.size();
    matrix.view([size[0], size[1], 1, 1])
}

/// `x Wᵀ`, `[tokens, out]`, of `x: [tokens, in]` and `W: [out, in]`, with `plus` added: `[out]` or `[tokens, out]`.
pub fn forward(x: &Tensor, matrix: &Tensor, plus: Option<&Tensor>) -> Tensor {
    if as_convolution(x, matrix) {
        let bias = plus.filter(|plus| plus.dim() == 1);
        let mut y = rows(&image(x).conv2d(&filter(matrix), bias, [1, 1], [0, 0], [1, 1], 1));
        if let Some(plus) = plus.filter(|plus| plus.dim() == 2) {
            y += plus;
        }
        return y;
    }
    match plus {
        Some(plus) => plus.addmm(x, &matrix.tr()),
        None => x.mm(&matrix.tr()),
    }
}

/// `y W`, `[tokens, in]`, of `y: [tokens, out]` and `W: [out, in]`.
pub fn backward(y: &Tensor, matrix: &Tensor) -> Tensor {
    if as_convolution(y, matrix) {
        return rows(&image(y).conv_transpose2d(&filter(matrix), None::<&Tensor>, [1, 1], [0, 0], [0, 0], 1, [1, 1]));
    }
    y.mm(matrix)
}

/// `x yᵀ` of each of a batch, `[batch, m, n]` of `x: [batch, m, d]` and `y: [batch, n, d]`.
pub(crate) fn each_transposed(x: &Tensor, y: &Tensor) -> Tensor {
    match single(x, y) {
        Some((x, y)) => forward(&x, &y, None).unsqueeze(0),
        None => x.bmm(&y.transpose(1, 2)),
    }
}

/// `x y` of each of a batch, `[batch, m, d]` of `x: [batch, m, n]` and `y: [batch, n, d]`.
pub(crate) fn each(x: &Tensor, y: &Tensor) -> Tensor {
    match single(x, y) {
        Some((x, y)) => backward(&x, &y).unsqueeze(0),
        None => x.bmm(y),
    }
}

/// Adds `xᵀ y` of each of a batch onto `out: [batch, n, d]` in float32, of `x: [batch, m, n]` and `y: [batch, m, d]`.
pub(crate) fn each_outer_onto(out: &Tensor, x: &Tensor, y: &Tensor) {
    match single(x, y).filter(|(x, _)| x.kind() == Kind::Float) {
        Some((x, y)) => kernels::add_outer_sum(&out.squeeze_dim(0), &x, &y),
        None => drop(out.shallow_clone().g_add_(&x.transpose(1, 2).bmm(y))),
    }
}

/// A batch of one as what is in it, where a device computes it better so.
fn single(x: &Tensor, y: &Tensor) -> Option<(Tensor, Tensor)> {
    (x.size()[0] == 1 && x.device() == Device::Cpu).then(|| (x.squeeze_dim(0), y.squeeze_dim(0)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detour_gives_the_same_products() {
        let random = |rows: i64, columns: i64| Tensor::randn([rows, columns], (Kind::Float, Device::Cpu));
        let (x, y, matrix, bias) = (random(300, 480), random(300, 512), random(512, 480), random(1, 512).squeeze());
        assert!(as_convolution(&x, &matrix));
        let near = |got: Tensor, expected: Tensor| (got - expected).abs().max().double_value(&[]) < 1e-3;
        assert!(near(forward(&x, &matrix, None), x.mm(&matrix.tr())));
        assert!(near(forward(&x, &matrix, Some(&bias)), x.mm(&matrix.tr()) + &bias));
        assert!(near(forward(&x, &matrix, Some(&y)), x.mm(&matrix.tr()) + &y));
        assert!(near(backward(&y, &matrix), y.mm(&matrix)));
    }

    #[test]
    fn batches_of_one_and_of_many_give_the_same_products() {
        let random = |sizes: [i64; 3]| Tensor::randn(sizes, (Kind::Float, Device::Cpu));
        let near = |got: &Tensor, expected: &Tensor| (got - expected).abs().max().double_value(&[]) < 1e-3;
        let (x, y, p) = (random([2, 300, 64]), random([2, 500, 64]), random([2, 300, 500]));
        let by_one = |of: &dyn Fn(&Tensor, &Tensor) -> Tensor, x: &Tensor, y: &Tensor| {
            Tensor::cat(&[of(&x.narrow(0, 0, 1), &y.narrow(0, 0, 1)), of(&x.narrow(0, 1, 1), &y.narrow(0, 1, 1))], 0)
        };
        let outer = |x: &Tensor, y: &Tensor| {
            let out = Tensor::ones([x.size()[0], x.size()[2], y.size()[2]], (Kind::Float, Device::Cpu));
            each_outer_onto(&out, x, y);
            out
        };
        assert!(near(&by_one(&each_transposed, &x, &y), &each_transposed(&x, &y)));
        assert!(near(&by_one(&each, &p, &y), &each(&p, &y)));
        assert!(near(&by_one(&outer, &p, &x), &outer(&p, &x)));
        assert!(near(&outer(&p, &x), &(p.transpose(1, 2).bmm(&x) + 1.0)));
    }
}
