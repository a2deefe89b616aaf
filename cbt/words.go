// Atomic words in memory that is not Go's: the only file with unsafe. The race
// detector does not see such memory, so every access to a word that others may
// change goes through here.

package cbt

import (
	"sync/atomic"
	"unsafe"
)

// words is memory, seen as words.
type words struct {
	bytes []byte // all that was reserved
	base  unsafe.Pointer

	// stepped, where a test set it, is called after each change of a word.
	stepped func()
}

func newWords(b []byte) words {
	return words{bytes: b, base: unsafe.Pointer(unsafe.SliceData(b))}
}

// word is the word at off, which is a multiple of 8 inside what was grown.
func (w *words) word(off int64) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Add(w.base, off))
}

// load returns the word at off.
func (w *words) load(off int64) uint64 { return w.word(off).Load() }

// store publishes v at off, after all that the caller wrote before.
func (w *words) store(off int64, v uint64) {
	w.word(off).Store(v)
	if w.stepped != nil {
		w.stepped()
	}
}

// link returns the link at off.
func (w *words) link(off int64) link { return link(w.load(off)) }

// header and data are the two parts of a node. They are for nodes that nobody
// else can change: not yet published, or of another epoch.
func (w *words) header(no node) []byte { return w.bytes[no.offset():][:nodeHeader] }
func (w *words) data(no node) []byte   { return w.bytes[no.offset()+nodeHeader:][:nodeData] }
