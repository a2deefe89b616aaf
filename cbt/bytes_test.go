package cbt

import "testing"

// at returns byte i of w.
func at(w uint64, i int) byte { return byte(w >> (8 * i)) }

// TestBytes compares the arithmetic on words with the same on single bytes, for
// every byte, every operand and neighbours of all kinds.
func TestBytes(t *testing.T) {
	for _, other := range []byte{0, 1, 127, 128, 254, 255} {
		for i := range 8 {
			for b := range 256 {
				w := uint64(other)*ones&^bytesMask(int64(i), int64(i)+1) | uint64(b)<<(8*i)
				for v := range 256 {
					checkBytes(t, w, byte(v), i)
				}
			}
		}
	}
}

func checkBytes(t *testing.T, w uint64, v byte, i int) {
	t.Helper()
	over, low, high := above(w, v), lower(w, uint64(v)), raise(w, bytesMask(int64(i), int64(i)+1), v)
	for j := range 8 {
		b := at(w, j)
		wantOver, wantHigh := byte(0), b
		if b > v {
			wantOver = 0x80
		}
		if j == i {
			wantHigh = max(b, v)
		}
		if at(over, j) != wantOver || at(low, j) != max(b, v)-v || at(high, j) != wantHigh {
			t.Fatalf("byte %d of %016x with %d\n got above %x, lower %d, raise %d\nwant %x, %d, %d", j, w, v,
				at(over, j), at(low, j), at(high, j), wantOver, max(b, v)-v, wantHigh)
		}
	}
}

func TestLowerByMore(t *testing.T) {
	for _, shift := range []uint64{255, 256, 1 << 40} {
		if got := lower(^uint64(0), shift); got != 0 {
			t.Errorf("lower by %d\n got %x\nwant 0", shift, got)
		}
	}
}
