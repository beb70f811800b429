//! The large matrix products, with weights as they are stored, `[out, in]`.
//!
//! In float32 on a CPU they go to oneDNN as convolutions over single points, over the same memory and exact to the same rounding:
//! libtorch has no other way to it in float32, and it is a tenth faster here than the products libtorch would take.

use tch::{Device, Kind, Tensor};

/// Products smaller than this, in multiplications, gain nothing by the detour.
const LEAST: i64 = 1 << 26;

fn as_convolution(x: &Tensor, matrix: &Tensor) -> bool {
    let size = matrix.size();
    let rows = x.size()[0];
    x.device() == Device::Cpu && x.kind() == Kind::Float && x.is_contiguous() && rows * size[0] * size[1] >= LEAST
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
pub(crate) fn forward(x: &Tensor, matrix: &Tensor, plus: Option<&Tensor>) -> Tensor {
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
pub(crate) fn backward(y: &Tensor, matrix: &Tensor) -> Tensor {
    if as_convolution(y, matrix) {
        return rows(&image(y).conv_transpose2d(&filter(matrix), None::<&Tensor>, [1, 1], [0, 0], [0, 0], 1, [1, 1]));
    }
    y.mm(matrix)
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
}
