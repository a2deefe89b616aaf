// Memory for the data of one request or reply.

package intercept

import (
	"math/bits"
	"sync"
)

const (
	// headroom is kept free in front of the data of a buffer for the header
	// of its reply, so that both are written as one. The longest is that of
	// an extended data chunk, 40 bytes.
	headroom = 64

	minClass = 12 // 4 KiB
	maxClass = 25 // 32 MiB, maxPayload
)

// buffer holds the payload of a request and then the reply to it.
type buffer struct {
	mem     []byte // headroom bytes, then the data
	account *account
	size    int64 // bytes charged to account

	// parts are what of mem is to be sent, in order.
	parts [][]byte

	// home takes the buffer back where it is one of a session's own.
	home chan *buffer
}

var bufferPools [maxClass + 1]sync.Pool

// sizeClass is what a buffer for n bytes really takes: the next power of two,
// 4 KiB at least.
func sizeClass(n int64) (class int, size int64) {
	class = max(minClass, bits.Len64(uint64(n-1)))
	return class, 1 << class
}

// newBuffer returns a buffer for n bytes, 1 to maxPayload, that a has been
// charged for.
func newBuffer(a *account, n int64) *buffer {
	class, size := sizeClass(n)
	b, _ := bufferPools[class].Get().(*buffer)
	if b == nil {
		b = &buffer{mem: make([]byte, headroom+size), size: size}
	}
	b.account = a
	return b
}

// data is the room for n bytes of data.
func (b *buffer) data(n int64) []byte { return b.mem[headroom : headroom+n] }

// free gives the buffer back; it must not be used any more.
func (b *buffer) free() {
	clear(b.parts)
	b.parts = b.parts[:0]
	if b.home != nil {
		b.home <- b
		return
	}
	a := b.account
	b.account = nil
	class, size := sizeClass(b.size)
	bufferPools[class].Put(b)
	a.give(size)
}
