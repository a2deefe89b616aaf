// Arithmetic on the eight map bytes of a word at once.

package cbt

// maxByte is the highest value of a map byte.
const maxByte = 255

const (
	ones = 0x0101010101010101
	tops = 0x8080808080808080
)

// above returns a word with the top bit of each byte set where the byte of w
// exceeds t.
func above(w uint64, t byte) uint64 {
	low := w &^ tops
	// The sum of two 7-bit values carries into the top bit, and no further.
	if t < 128 {
		return (low + uint64(127-t)*ones | w) & tops
	}
	return (low + uint64(255-t)*ones) & w & tops
}

// fill turns the top bits that above returns into whole bytes.
func fill(m uint64) uint64 { return (m >> 7) * maxByte }

// lower subtracts shift from each byte of w and leaves 0 where that is
// negative: the bytes of a map whose base moved up by shift.
func lower(w uint64, shift uint64) uint64 {
	if shift >= maxByte {
		return 0
	}
	keep := fill(above(w, byte(shift)))
	// No byte that is kept is below shift, so none borrows from its neighbour.
	return w&keep - shift*ones&keep
}

// raise lifts each byte of w that mask covers to at least v.
func raise(w, mask uint64, v byte) uint64 {
	if v == 0 {
		return w
	}
	lift := mask &^ fill(above(w, v-1))
	return w&^lift | uint64(v)*ones&lift
}

// bytesMask covers the bytes from to to-1 of a word, 0 <= from < to <= 8.
func bytesMask(from, to int64) uint64 {
	return ^uint64(0) << (8 * from) & (^uint64(0) >> (8 * (8 - to)))
}
