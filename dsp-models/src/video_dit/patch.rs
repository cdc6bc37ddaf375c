//! From a video to tokens and back, without any parameter.
//!
//! A token is a patch of `[pt, ph, pw]` frames, rows and columns. Where the patch does not divide the video, the
//! video is padded behind with zeros, as the original does; on the way back the padding is cut off.

use burn::tensor::Tensor;

use crate::error::ModelError;

/// In which order a token's channels hold its patch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PatchOrder {
    /// `(channel, pt, ph, pw)`: the order of a convolution's weight, for what goes into the model.
    ChannelFirst,
    /// `(pt, ph, pw, channel)`: the order of the model's output.
    ChannelLast,
}

/// The patches of a video.
///
/// # Shapes
/// - `video`: `[B, C, F, H, W]`
/// - returns: `[B, T, S, 1, C·pt·ph·pw]`, `S` row by row
pub fn patchify(video: Tensor<5>, [pt, ph, pw]: [usize; 3], order: PatchOrder) -> Tensor<5> {
    let [batch, channels, frames, height, width] = video.dims();
    let [t, h, w] = [frames.div_ceil(pt), height.div_ceil(ph), width.div_ceil(pw)];
    let video = pad_behind(video, [t * pt, h * ph, w * pw]);
    let x: Tensor<8> = video.reshape([batch, channels, t, pt, h, ph, w, pw]);
    let x = match order {
        PatchOrder::ChannelFirst => x.permute([0, 2, 4, 6, 1, 3, 5, 7]),
        PatchOrder::ChannelLast => x.permute([0, 2, 4, 6, 3, 5, 7, 1]),
    };
    x.reshape([batch, t, h * w, 1, channels * pt * ph * pw])
}

/// The video of output tokens, in [`PatchOrder::ChannelLast`]: the inverse of [`patchify`].
///
/// # Shapes
/// - `tokens`: `[B, T, S, 1, pt·ph·pw·C]`; `size`: the video's frames, height and width
/// - returns: `[B, C, F, H, W]`
///
/// # Errors
/// [`ModelError::Shape`] if that video has not as many tokens.
pub fn unpatchify(
    tokens: Tensor<5>,
    [pt, ph, pw]: [usize; 3],
    [frames, height, width]: [usize; 3],
) -> Result<Tensor<5>, ModelError> {
    let dims = tokens.dims();
    let [t, h, w] = [frames.div_ceil(pt), height.div_ceil(ph), width.div_ceil(pw)];
    let volume = pt * ph * pw;
    if dims[1..4] != [t, h * w, 1] || !dims[4].is_multiple_of(volume) {
        return Err(ModelError::Shape {
            what: "the output",
            got: dims.to_vec(),
            rule: format!(
                "a video of {frames} frames of {height}·{width} has [{t}, {}, 1] tokens of a multiple of {volume} channels",
                h * w
            ),
        });
    }
    let (batch, channels) = (dims[0], dims[4] / volume);
    let x: Tensor<8> = tokens.reshape([batch, t, h, w, pt, ph, pw, channels]);
    let x = x.permute([0, 7, 1, 4, 2, 5, 3, 6]);
    let x = x.reshape([batch, channels, t * pt, h * ph, w * pw]);
    Ok(x.narrow(2, 0, frames)
        .narrow(3, 0, height)
        .narrow(4, 0, width))
}

fn pad_behind(mut video: Tensor<5>, extents: [usize; 3]) -> Tensor<5> {
    for (dim, extent) in (2..).zip(extents) {
        let mut dims = video.dims();
        if dims[dim] < extent {
            dims[dim] = extent - dims[dim];
            let zeros = Tensor::zeros(dims, (&video.device(), video.dtype()));
            video = Tensor::cat(vec![video, zeros], dim);
        }
    }
    video
}
