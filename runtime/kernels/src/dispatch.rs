//! Which instruction set the kernels run on: found once, or forced once.

use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use crate::simd::Neon;
#[cfg(target_arch = "x86_64")]
use crate::simd::{Avx2, Avx512};
use crate::simd::{Op, Plain, Simd};

/// An instruction set that kernels are written for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InstructionSet {
    /// No SIMD beyond what the compiler finds by itself.
    Plain,
    /// x86-64: AVX2, FMA and F16C.
    Avx2,
    /// x86-64: AVX-512 F, BW, VL and DQ.
    Avx512,
    /// aarch64: NEON.
    Neon,
}

impl InstructionSet {
    /// Every instruction set, best first.
    pub const ALL: [Self; 4] = [Self::Avx512, Self::Avx2, Self::Neon, Self::Plain];

    /// The name on the command line and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    /// Whether this processor has it.
    pub fn is_present(self) -> bool {
        Kernels::with(self).is_some()
    }
}

impl fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why an instruction set cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ForceError {
    /// No such name.
    #[error("unknown instruction set {name:?}: expected avx512, avx2, neon or plain")]
    Unknown {
        /// What was asked for.
        name: String,
    },
    /// The processor lacks it.
    #[error("this processor does not have {wanted}")]
    NotPresent {
        /// What was asked for.
        wanted: InstructionSet,
    },
    /// Kernels have already run, or another set was forced before.
    #[error("cannot change to {wanted}: {chosen} is in use already")]
    AlreadyChosen {
        /// What was asked for.
        wanted: InstructionSet,
        /// What is in use.
        chosen: InstructionSet,
    },
}

impl FromStr for InstructionSet {
    type Err = ForceError;

    fn from_str(name: &str) -> Result<Self, ForceError> {
        Self::ALL
            .into_iter()
            .find(|set| set.name() == name)
            .ok_or_else(|| ForceError::Unknown { name: name.to_owned() })
    }
}

/// Proof that an instruction set is present, whichever it is.
#[derive(Clone, Copy, Debug)]
enum Token {
    Plain(Plain),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon),
}

/// The kernels of one instruction set. A copyable handle: take it once, outside a hot loop.
///
/// Every product of this crate is a method here; the free functions of the same names use [`Kernels::get`].
#[derive(Clone, Copy, Debug)]
pub struct Kernels {
    token: Token,
}

static CHOSEN: OnceLock<Kernels> = OnceLock::new();

impl Kernels {
    /// The process-wide choice: the one forced, else the best present.
    #[inline]
    pub fn get() -> Self {
        *CHOSEN.get_or_init(|| {
            InstructionSet::ALL.into_iter().find_map(Self::with).unwrap_or(Self { token: Token::Plain(Plain) })
        })
    }

    /// The kernels of `set`, if the processor has it.
    pub fn with(set: InstructionSet) -> Option<Self> {
        let token = match set {
            InstructionSet::Plain => Some(Token::Plain(Plain)),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2 => Avx2::detect().map(Token::Avx2),
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => Avx512::detect().map(Token::Avx512),
            #[cfg(target_arch = "aarch64")]
            InstructionSet::Neon => Neon::detect().map(Token::Neon),
            _ => None,
        };
        token.map(|token| Self { token })
    }

    /// The kernels of every instruction set present, best first.
    pub fn all_present() -> impl Iterator<Item = Self> {
        InstructionSet::ALL.into_iter().filter_map(Self::with)
    }

    /// Which instruction set this is.
    pub fn instruction_set(self) -> InstructionSet {
        match self.token {
            Token::Plain(_) => InstructionSet::Plain,
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(_) => InstructionSet::Avx2,
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(_) => InstructionSet::Avx512,
            #[cfg(target_arch = "aarch64")]
            Token::Neon(_) => InstructionSet::Neon,
        }
    }

    /// Runs `op` compiled for this instruction set.
    #[inline(always)]
    pub(crate) fn run<O: Op>(self, op: O) -> O::Out {
        match self.token {
            Token::Plain(token) => token.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            Token::Avx2(token) => token.vectorize(op),
            #[cfg(target_arch = "x86_64")]
            Token::Avx512(token) => token.vectorize(op),
            #[cfg(target_arch = "aarch64")]
            Token::Neon(token) => token.vectorize(op),
        }
    }
}

/// The name of the instruction set in use.
pub fn instruction_set() -> &'static str {
    Kernels::get().instruction_set().name()
}

/// Fixes the instruction set of the whole process. To be called before any kernel has run; once.
///
/// # Errors
/// If the processor lacks `set`, or another set is in use already.
pub fn force_instruction_set(set: InstructionSet) -> Result<(), ForceError> {
    let kernels = Kernels::with(set).ok_or(ForceError::NotPresent { wanted: set })?;
    let chosen = CHOSEN.get_or_init(|| kernels).instruction_set();
    if chosen == set { Ok(()) } else { Err(ForceError::AlreadyChosen { wanted: set, chosen }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for set in InstructionSet::ALL {
            assert_eq!(set.name().parse(), Ok(set));
        }
        assert_eq!("sse9".parse::<InstructionSet>(), Err(ForceError::Unknown { name: "sse9".into() }));
    }

    #[test]
    fn one_choice_per_process() {
        let best = Kernels::all_present().next().unwrap().instruction_set();
        assert_eq!(force_instruction_set(best), Ok(()));
        assert_eq!(instruction_set(), best.name());
        assert_eq!(force_instruction_set(best), Ok(()));
        for other in InstructionSet::ALL.into_iter().filter(|&other| other != best) {
            let expected = match other.is_present() {
                true => ForceError::AlreadyChosen { wanted: other, chosen: best },
                false => ForceError::NotPresent { wanted: other },
            };
            assert_eq!(force_instruction_set(other), Err(expected));
        }
    }
}
