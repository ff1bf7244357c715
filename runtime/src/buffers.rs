//! Buffers that are made, or only counted: what a memory plan says of them and what is made come from the same lines.

/// Makes the buffers that it is asked for, or counts what they would take.
#[derive(Default)]
pub struct Buffers {
    /// Counted so far, where none are made.
    counted: Option<u64>,
}

impl Buffers {
    /// Bytes of the buffers that `make` asks for. None of them is made: all that it is given are empty.
    pub fn bytes_of<T>(make: impl FnOnce(&mut Self) -> T) -> u64 {
        let mut buffers = Self { counted: Some(0) };
        make(&mut buffers);
        buffers.counted.unwrap_or(0)
    }

    /// So many zeros.
    pub fn zeros<T: Copy + Default>(&mut self, len: usize) -> Vec<T> {
        self.filled(len, T::default())
    }

    /// So many of the same.
    pub fn filled<T: Copy>(&mut self, len: usize, value: T) -> Vec<T> {
        if self.count::<T>(len) { Vec::new() } else { vec![value; len] }
    }

    /// Room for this many.
    pub fn room<T>(&mut self, capacity: usize) -> Vec<T> {
        if self.count::<T>(capacity) { Vec::new() } else { Vec::with_capacity(capacity) }
    }

    /// The first `len` of `values`.
    pub fn listed<T>(&mut self, len: usize, values: impl Iterator<Item = T>) -> Vec<T> {
        let mut list = self.room(len);
        if self.counted.is_none() {
            list.extend(values.take(len));
        }
        list
    }

    /// Counts a buffer, if nothing more is done.
    fn count<T>(&mut self, len: usize) -> bool {
        let Some(bytes) = &mut self.counted else { return false };
        *bytes += (len * size_of::<T>()) as u64;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_what_is_made() {
        let make = |buffers: &mut Buffers| {
            (buffers.zeros::<f32>(10), buffers.room::<(u32, u64)>(3), buffers.listed(2, [7u16, 8, 9].into_iter()))
        };
        assert_eq!(Buffers::bytes_of(make), 10 * 4 + 3 * 16 + 2 * 2);
        let (zeros, room, list) = make(&mut Buffers::default());
        assert_eq!((zeros.as_slice(), room.len(), room.capacity()), (&[0.0; 10][..], 0, 3));
        assert_eq!(list, [7, 8]);
        Buffers::bytes_of(|buffers| {
            let (zeros, room, list) = make(buffers);
            assert_eq!((zeros.capacity(), room.capacity(), list.capacity()), (0, 0, 0));
        });
    }
}
