//! Compute kernels of a CPU language-model runtime: products straight from f16, bf16, f32 and quantised weights, with f32
//! activations and f32 accumulation, chosen at run time for the instruction set at hand. Dot products with quantised rows
//! round the activations to 16-bit integers first (`whole.rs`).
//!
//! The crate knows slices, rows and threads. It knows nothing of models, layers, files or tokenizers.
//!
//! # What a caller may rely on
//!
//! On one instruction set, results never depend on the number of threads, nor on how the caller cuts the work:
//!
//! - [`matvec`], [`gathered_dots`], [`dot`]: the result of a row depends on that row and on `x` alone.
//! - [`add_scaled_rows`], [`add_weighted_rows_serial`], [`gathered_add`], [`add_scaled`]: each output element has one
//!   accumulator, which takes the rows strictly in list order. So one call equals any sequence of calls over consecutive
//!   parts of the list, bit for bit.
//! - [`matmul_rows_add`]: the same order, per token. So it may be called over consecutive blocks of rows, and equals
//!   [`add_scaled_rows`] with every row listed. Blocks that are multiples of [`ROW_BLOCK`] are fast.
//! - [`matvec_each`], [`matvec_each_serial`], [`add_weighted_rows_each_serial`], [`gathered_dots_each`], [`gathered_add_each`]:
//!   for each token what [`matvec`], [`add_weighted_rows_serial`], [`gathered_dots`] and [`gathered_add`] give for it alone, bit for
//!   bit. [`selected_add`] likewise, for many tokens; so [`selected_dots`], but
//!   for rows of integers, whose pairs have an order of their own.
//! - [`matmul`]: the result of an output depends on its row, its token, and on whether there are fewer than
//!   [`MATMUL_TOKENS_MIN`] tokens. With fewer, it equals [`matvec`] bit for bit.
//!
//! Other instruction sets give other roundings (other lane counts, and no fused multiply-add without SIMD).

mod above;
mod activation;
mod bandwidth;
mod convert;
mod dispatch;
mod element;
mod elementwise;
mod few;
mod gathered;
mod many;
mod many_whole;
mod matmul;
mod matrix;
mod matvec;
mod pairs;
#[cfg(feature = "product")]
mod product;
pub mod reference;
mod row;
mod rows;
mod selected;
mod selected_whole;
mod simd;
mod softmax;
mod threads;
mod tile;
mod whole;

pub use above::above;
pub use activation::{gelu, gelu_tanh, relu, silu, softmax};
pub use bandwidth::{read_bandwidth, read_bandwidth_of};
pub use convert::{store_bf16, store_f16, store_i8, to_f32};
pub use dispatch::{ForceError, InstructionSet, Kernels, force_instruction_set, instruction_set};
pub use element::{Element, Q4_BLOCK};
pub use elementwise::{layer_norm, rms_norm, rope_rotate_half};
pub use few::{Vectors, add_weighted_rows_each_serial, matvec_each, matvec_each_serial};
pub use gathered::{TokenAt, gathered_add_each, gathered_dots_each};
pub use matmul::{MATMUL_TOKENS_MIN, MatmulScratch, ROW_BLOCK, matmul, matmul_rows_add};
pub use matrix::{Matrix, MatrixError, RowLayout};
pub use matvec::{RowAt, TASK_BYTES, dot, gathered_dots, matvec, matvec_beside, matvec_serial};
pub use pairs::RowTokens;
#[cfg(feature = "product")]
pub use product::{View, product};
pub use row::{Row, SCALE_BYTES, ScaleGroup};
pub use rows::{add_scaled, add_scaled_rows, add_scaled_rows_serial, add_weighted_rows_serial, gathered_add};
pub use selected::{selected_add, selected_dots};
pub use softmax::{SoftmaxPart, softmax_part};
pub use threads::Threads;
