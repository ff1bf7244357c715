//! A lower instruction set can be forced, once, before the first kernel.

use flashlm_kernels::{Element, ForceError, InstructionSet, Kernels, dot, force_instruction_set, instruction_set};

/// The only test of this process: the choice is process-wide.
#[test]
fn plain_can_be_forced() {
    assert_eq!(force_instruction_set(InstructionSet::Plain), Ok(()));
    assert_eq!(instruction_set(), "plain");
    let row: Vec<u8> = (0..100).flat_map(|i| half::f16::from_f32(0.1 * i as f32).to_le_bytes()).collect();
    let x: Vec<f32> = (0..100).map(|i| 0.3 - 0.01 * i as f32).collect();
    let plain = Kernels::with(InstructionSet::Plain).unwrap();
    assert_eq!(dot(Element::F16, &row, &x).to_bits(), plain.dot(Element::F16, &row, &x).to_bits());
    let best = Kernels::all_present().next().unwrap().instruction_set();
    if best != InstructionSet::Plain {
        let refused = ForceError::AlreadyChosen { wanted: best, chosen: InstructionSet::Plain };
        assert_eq!(force_instruction_set(best), Err(refused));
    }
}
