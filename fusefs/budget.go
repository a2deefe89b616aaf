// A limit for the memory of what is made.

package fusefs

import (
	"fmt"
	"sync/atomic"
	"syscall"
)

// contentLimit bounds the memory for all contents of files that are open at once,
// in bytes. It is room for some 16 million lines of changes, or for the qcow2
// files of fourteen devices of 16 TiB with every other tracking block changed.
const contentLimit = 512 << 20

// budget counts the bytes that contents hold.
type budget struct{ used atomic.Int64 }

// take adds n bytes; beyond contentLimit it adds none and fails with ENOMEM.
func (b *budget) take(n int64) error {
	if used := b.used.Add(n); used > contentLimit {
		b.used.Add(-n)
		return fmt.Errorf("hold %d bytes more of open files: %w", n, syscall.ENOMEM)
	}
	return nil
}
