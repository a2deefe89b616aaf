// Making a map again from what was written down of it.

package cbt

import (
	"fmt"

	"github.com/google/uuid"
)

// Restore makes a map in mem, which is empty or all zeroes, with the history of
// one that was written down: its generation, its last snapshot's number, and the
// base that its bytes count from. Nothing is marked yet; MarkAt does that, with
// numbers above base. Where the numbers from base on are more than a byte can
// count, the base is as low as it can be: older history is lost.
func Restore(mem Memory, size, blockSize int64, generation uuid.UUID, number, base uint64) (*Map, error) {
	if base > number {
		return nil, fmt.Errorf("restore a changed-block map: base %d above number %d", base, number)
	}
	if number+1 > base+maxByte {
		base = number + 1 - maxByte
	}
	return newEmpty(mem, size, blockSize, history{number: number + 1, base: base, generation: generation})
}
