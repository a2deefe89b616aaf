// Memory for the data of one request or reply.

package intercept

import (
	"math/bits"
	"runtime"
	"sync"
	"sync/atomic"
)

const (
	// headroom is kept free in front of the data of a buffer for the header
	// of its reply, so that both are written as one. The longest is that of
	// an extended data chunk, 40 bytes.
	headroom = 64

	// apartSize is from how many bytes on data is written apart from its header:
	// then it is worth more that the data lies at the start of a page, where
	// it is, in the socket and in the client's memory. The headroom is a page.
	apartSize = 64 << 10

	pageSize = 4096 // where Go's large allocations begin, too

	minClass = 12 // 4 KiB
	maxClass = 25 // 32 MiB, maxPayload

	// freshSize is how many bytes of buffers are made until the garbage
	// collector is told.
	freshSize = 16 << 20
)

// buffer holds the payload of a request and then the reply to it.
type buffer struct {
	mem     []byte // head bytes, then the data
	head    int64
	account *account
	size    int64 // bytes charged to account

	// parts are what of mem is to be sent, in order.
	parts [][]byte

	// home takes the buffer back where it is one of a session's own.
	home chan *buffer
}

var bufferPools [maxClass + 1]sync.Pool

// fresh counts the bytes of buffers that no pool had.
type fresh struct {
	bytes      atomic.Int64
	collecting sync.Mutex
}

var freshBytes fresh

// made says that n bytes are made. Requests of one size after those of another
// leave memory in a pool that nobody asks any more, and to the garbage collector
// that is in use: by itself it would let the process grow to twice as much, and
// once more, before the pool is empty. Who makes buffers waits for it to look; who
// finds what he needs in a pool never comes here.
func (f *fresh) made(n int64) {
	if f.bytes.Add(n) < freshSize {
		return
	}
	f.collecting.Lock()
	defer f.collecting.Unlock()
	if f.bytes.Load() >= freshSize { // nobody has meanwhile
		runtime.GC()
		f.bytes.Store(0)
	}
}

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
		freshBytes.made(size)
		head := int64(headroom)
		if size >= apartSize {
			head = pageSize
		}
		b = &buffer{mem: make([]byte, head+size), head: head, size: size}
	}
	b.account = a
	return b
}

// data is the room for n bytes of data.
func (b *buffer) data(n int64) []byte { return b.mem[b.head : b.head+n] }

// addData makes mem[head:end] something to be sent; the data in it begins at at.
func (b *buffer) addData(head, at, end int64) {
	if end-at < apartSize {
		b.parts = append(b.parts, b.mem[head:end])
		return
	}
	b.parts = append(b.parts, b.mem[head:at], b.mem[at:end])
}

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
