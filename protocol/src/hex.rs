//! Bytes as lower-case hexadecimal digits, in text and (`#[serde(with = "hex")]`) in documents.

use serde::{Deserialize, Deserializer, Serializer, de::Error};

const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// The digits of `bytes`, two a byte.
#[must_use]
pub fn encode(bytes: &[u8]) -> String {
    bytes.iter().flat_map(|&byte| [byte >> 4, byte & 15]).map(|digit| DIGITS[usize::from(digit)] as char).collect()
}

/// The bytes of an even number of lower-case digits.
#[must_use]
pub fn decode(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| DIGITS.iter().position(|&known| known == byte).map(|value| value as u8);
    let (pairs, rest) = text.as_bytes().as_chunks::<2>();
    let bytes = pairs.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect();
    if rest.is_empty() { bytes } else { None }
}

/// For serde.
///
/// # Errors
/// As the serializer says.
pub fn serialize<S: Serializer>(bytes: impl AsRef<[u8]>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&encode(bytes.as_ref()))
}

/// For serde.
///
/// # Errors
/// Where there are other characters, or not as many as the type needs.
pub fn deserialize<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<Vec<u8>>,
{
    let bytes = decode(&String::deserialize(deserializer)?).ok_or_else(|| D::Error::custom("not hexadecimal"))?;
    T::try_from(bytes).map_err(|_| D::Error::custom("not the right number of hexadecimal digits"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_lower_case_and_in_pairs() {
        assert_eq!(encode(&[0, 0xab, 0x5f]), "00ab5f");
        assert_eq!(decode("00ab5f"), Some(vec![0, 0xab, 0x5f]));
        for wrong in ["0", "0A", "0g", "00 "] {
            assert_eq!(decode(wrong), None, "{wrong}");
        }
    }
}
