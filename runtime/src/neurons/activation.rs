//! The activation functions, as models name them.

use flashlm_formats::model::Activation;

/// The activation function, in place.
pub(super) fn activate(activation: Activation, values: &mut [f32]) {
    match activation {
        Activation::Relu => flashlm_kernels::relu(values),
        Activation::Relu2 => values.iter_mut().for_each(|v| *v = v.max(0.0) * v.max(0.0)),
        Activation::FatRelu(threshold) => values.iter_mut().for_each(|v| *v = if *v > threshold { *v } else { 0.0 }),
        Activation::Gelu => flashlm_kernels::gelu(values),
        Activation::GeluTanh => flashlm_kernels::gelu_tanh(values),
        Activation::Silu => flashlm_kernels::silu(values),
    }
}
