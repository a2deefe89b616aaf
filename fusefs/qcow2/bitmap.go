// Sets of the entries of one table.

package qcow2

import "math/bits"

// bitmap is a set of numbers; nil is empty.
type bitmap []uint64

// newBitmap returns an empty set that has room for the numbers below n.
func newBitmap(n int64) bitmap { return make(bitmap, ceil(n, 64)) }

// add adds [from, to), which is not empty, and returns how many it is.
func (b bitmap) add(from, to int64) int64 {
	first, last := from/64, (to-1)/64
	head, tail := ^uint64(0)<<(from%64), ^uint64(0)>>(63-(to-1)%64)
	if first == last {
		b[first] |= head & tail
		return to - from
	}
	b[first] |= head
	for i := first + 1; i < last; i++ {
		b[i] = ^uint64(0)
	}
	b[last] |= tail
	return to - from
}

// has says whether i is in the set.
func (b bitmap) has(i int64) bool { return b != nil && b[i/64]>>(i%64)&1 != 0 }

// below returns how many numbers below i are in the set.
func (b bitmap) below(i int64) int64 {
	if b == nil {
		return 0
	}
	n := 0
	for _, w := range b[:i/64] {
		n += bits.OnesCount64(w)
	}
	if i%64 != 0 {
		n += bits.OnesCount64(b[i/64] << (64 - i%64))
	}
	return int64(n)
}

// nth returns the number in the set below which there are n others. The set has
// more than n.
func (b bitmap) nth(n int64) int64 {
	i := 0
	for ; ; i++ {
		ones := int64(bits.OnesCount64(b[i]))
		if n < ones {
			break
		}
		n -= ones
	}
	w := b[i]
	for ; n > 0; n-- {
		w &= w - 1 // without its lowest number
	}
	return int64(i)*64 + int64(bits.TrailingZeros64(w))
}

// gap returns the first number from i on that is not in the set.
func (b bitmap) gap(i int64) int64 {
	j := i / 64
	w := ^b[j] &^ (1<<(i%64) - 1)
	for w == 0 {
		if j++; j == int64(len(b)) {
			return j * 64
		}
		w = ^b[j]
	}
	return j*64 + int64(bits.TrailingZeros64(w))
}
