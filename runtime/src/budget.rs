//! A memory budget as people write it: `50%` of the model, `4GiB`, `6.7GB`, or a number of bytes.

use std::str::FromStr;

/// A budget for the whole process.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    /// Bytes.
    Bytes(u64),
    /// Per cent of the model's stored bytes.
    PercentOfModel(f64),
}

impl Budget {
    /// The budget in bytes, for a model of `model_bytes`.
    pub fn bytes(self, model_bytes: u64) -> u64 {
        match self {
            Budget::Bytes(bytes) => bytes,
            Budget::PercentOfModel(percent) => (model_bytes as f64 * percent / 100.0) as u64,
        }
    }
}

/// The text is not a budget.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not an amount of memory; write 50% (of the model), 4GiB, 6.7GB, 512MiB or a number of bytes")]
pub struct BudgetError(String);

impl FromStr for Budget {
    type Err = BudgetError;

    fn from_str(text: &str) -> Result<Self, BudgetError> {
        let fail = || BudgetError(text.to_owned());
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let number: f64 = number.parse().map_err(|_| fail())?;
        let factor = match unit.trim().to_ascii_lowercase().as_str() {
            "%" if number > 0.0 && number <= 10_000.0 => return Ok(Budget::PercentOfModel(number)),
            "" | "b" => 1.0,
            "kb" => 1e3,
            "mb" => 1e6,
            "gb" => 1e9,
            "k" | "kib" => 1024.0,
            "m" | "mib" => 1024.0 * 1024.0,
            "g" | "gib" => 1024.0 * 1024.0 * 1024.0,
            "tb" => 1e12,
            "t" | "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
            _ => return Err(fail()),
        };
        let bytes = number * factor;
        if bytes >= 1.0 && bytes < 2f64.powi(60) { Ok(Budget::Bytes(bytes as u64)) } else { Err(fail()) }
    }
}

/// Bytes for people: `1.50 GB`.
pub fn human_bytes(bytes: u64) -> String {
    match unit(bytes as f64) {
        (1.0, unit) => format!("{bytes} {unit}"),
        (size, unit) => format!("{:.2} {unit}", bytes as f64 / size),
    }
}

fn unit(bytes: f64) -> (f64, &'static str) {
    let units = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")];
    units.into_iter().find(|(size, _)| bytes >= *size).unwrap_or((1.0, "bytes"))
}

/// An estimate for people: with the two digits that it may claim, `0.012`, `3.4`, `1200`.
pub fn about(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return format!("{value}");
    }
    // Rounding may make a digit more: 9.96 is 10.
    let rounded: f64 = format!("{value:.1e}").parse().unwrap_or(value);
    let decimals = (1.0 - rounded.abs().log10().floor()).clamp(0.0, 12.0) as usize;
    format!("{rounded:.decimals$}")
}

/// Bytes as an estimate for people: `1.5 GB`, `390 kB`.
pub fn about_bytes(bytes: f64) -> String {
    let (size, unit) = unit(about(bytes).parse().unwrap_or(bytes));
    format!("{} {unit}", about(bytes / size))
}

/// A number of things for people: `1 token`, `2 tokens`.
pub fn counted(number: usize, noun: &str) -> String {
    if number == 1 { format!("1 {noun}") } else { format!("{number} {noun}s") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_read_as_written() {
        let cases = [
            ("50%", Budget::PercentOfModel(50.0)),
            ("12.5%", Budget::PercentOfModel(12.5)),
            ("4GiB", Budget::Bytes(4 << 30)),
            ("6.7GB", Budget::Bytes(6_700_000_000)),
            ("512m", Budget::Bytes(512 << 20)),
            ("1TB", Budget::Bytes(1_000_000_000_000)),
            ("2TiB", Budget::Bytes(2 << 40)),
            ("1000", Budget::Bytes(1000)),
        ];
        for (text, budget) in cases {
            assert_eq!(text.parse(), Ok(budget), "{text}");
        }
        for text in ["", "%", "0%", "-1", "GiB", "4 bananas", "1e99", "nan", "99999999999999GiB"] {
            assert!(text.parse::<Budget>().is_err(), "{text}");
        }
        assert_eq!(Budget::PercentOfModel(50.0).bytes(1000), 500);
    }

    #[test]
    fn estimates_have_two_digits() {
        for (value, said) in [
            (0.0, "0"),
            (0.012_34, "0.012"),
            (0.099_6, "0.10"),
            (1.0, "1.0"),
            (9.96, "10"),
            (23.456, "23"),
            (234.9, "230"),
            (123_456.0, "120000"),
        ] {
            assert_eq!(about(value), said);
        }
        for (bytes, said) in [(0.0, "0 bytes"), (395_264.0, "400 kB"), (999_999.0, "1.0 MB"), (1.52e9, "1.5 GB")] {
            assert_eq!(about_bytes(bytes), said);
        }
    }
}
