//! Formats sizes, rates, times and counts for people.

use std::time::Duration;

/// Formats a size in binary units. Sizes below 1 KiB are exact (`512 B`). Larger sizes have three
/// digits (`1.50 MiB`, `23.4 GiB`), or four if the number is 1000 or more (`1023 GiB`).
#[must_use]
pub fn bytes(count: u64) -> String {
    scaled(count as f64, &["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"])
}

/// Formats a rate in bytes per second: `3.21 GiB/s`, or `-` if the time is zero.
#[must_use]
pub fn rate(count: u64, time: Duration) -> String {
    if time.is_zero() {
        return "-".into();
    }
    scaled(count as f64 / time.as_secs_f64(), &["B/s", "KiB/s", "MiB/s", "GiB/s", "TiB/s"])
}

/// Formats a time with three significant digits (`812 µs`, `45.6 ms`, `1.23 s`). Times of 100 s or
/// more are shown in minutes and seconds (`2 min 05 s`).
#[must_use]
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    if time >= Duration::from_secs(100) {
        let whole = (time + Duration::from_millis(500)).as_secs();
        return format!("{} min {:02} s", whole / 60, whole % 60);
    }
    match seconds {
        0.0 => "0 s".into(),
        s if rounds_below(s * 1e6, 1000.0) => format!("{} µs", three_digits(s * 1e6)),
        s if rounds_below(s * 1e3, 1000.0) => format!("{} ms", three_digits(s * 1e3)),
        s => format!("{} s", three_digits(s)),
    }
}

/// Formats a count with spaces between groups of three digits: `1 234 567`.
#[must_use]
pub fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() * 4 / 3);
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped
}

fn scaled(value: f64, units: &[&str]) -> String {
    let mut value = value;
    let mut units = units.iter().peekable();
    let mut whole = true;
    while let Some(unit) = units.next() {
        // 1023.9 KiB would round to "1024 KiB", so it is shown as 1.00 MiB.
        if rounds_below(value, 1024.0) || units.peek().is_none() {
            // A count of bytes has no fraction; a rate can have one.
            let number = if whole && value.fract() == 0.0 { format!("{value}") } else { three_digits(value) };
            return format!("{number} {unit}");
        }
        value /= 1024.0;
        whole = false;
    }
    unreachable!("the last unit always returns")
}

fn rounds_below(value: f64, limit: f64) -> bool {
    value < limit - 0.5
}

fn three_digits(value: f64) -> String {
    match value {
        v if v < 9.995 => format!("{v:.2}"),
        v if v < 99.95 => format!("{v:.1}"),
        v => format!("{v:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_exact_in_bytes_and_rounded_above() {
        let cases = [
            (0, "0 B"),
            (1, "1 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10 * 1024, "10.0 KiB"),
            (128 << 20, "128 MiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (1_000_000_000, "954 MiB"),
            (u64::MAX, "16.0 EiB"),
        ];
        for (count, shown) in cases {
            assert_eq!(bytes(count), shown);
        }
    }

    #[test]
    fn rates_are_per_second() {
        assert_eq!(rate(1 << 30, Duration::from_millis(500)), "2.00 GiB/s");
        assert_eq!(rate(1, Duration::from_secs(3)), "0.33 B/s");
        assert_eq!(rate(1, Duration::ZERO), "-");
    }

    #[test]
    fn times_have_three_digits_below_100_s() {
        let cases = [
            (0, "0 s"),
            (812, "812 µs"),
            (999_400, "999 ms"),
            (999_700, "1.00 s"),
            (45_600, "45.6 ms"),
            (1_234_000, "1.23 s"),
            (99_990_000, "100 s"),
            (125_000_000, "2 min 05 s"),
        ];
        for (micros, shown) in cases {
            assert_eq!(duration(Duration::from_micros(micros)), shown);
        }
    }

    #[test]
    fn thousands_are_separated() {
        let shown: Vec<_> = [0, 999, 1000, 1_234_567].map(grouped).into();
        assert_eq!(shown, ["0", "999", "1 000", "1 234 567"]);
    }
}
