// The log, which must never hold the daemon up: its reader may be slow, or its
// file on a disk that waits for us.

package control

import (
	"bytes"
	"fmt"
	"io"
	"sync/atomic"
	"time"
)

const (
	logLines = 1024            // that wait for their writer; more are dropped
	logFlush = 2 * time.Second // for the last lines, at the end
)

// logWriter hands lines to a goroutine that writes them. Write never waits: a
// line for which there is no room is dropped and counted.
type logWriter struct {
	lines      chan []byte
	dropped    atomic.Int64
	quit, done chan struct{}
	started    bool
}

func newLogWriter() *logWriter {
	return &logWriter{
		lines: make(chan []byte, logLines),
		quit:  make(chan struct{}),
		done:  make(chan struct{}),
	}
}

// Write takes one line.
func (w *logWriter) Write(line []byte) (int, error) {
	select {
	case w.lines <- bytes.Clone(line):
	default:
		w.dropped.Add(1)
	}
	return len(line), nil
}

// start begins to write the lines to out. Until then they are kept: of a start
// that is refused the reason alone is told.
func (w *logWriter) start(out io.Writer) {
	w.started = true
	go func() {
		defer close(w.done)
		for {
			select {
			case line := <-w.lines:
				w.put(out, line)
			case <-w.quit:
				for len(w.lines) > 0 {
					w.put(out, <-w.lines)
				}
				return
			}
		}
	}()
}

func (w *logWriter) put(out io.Writer, line []byte) {
	if n := w.dropped.Swap(0); n > 0 {
		fmt.Fprintf(out, "(%d lines of the log were dropped)\n", n)
	}
	out.Write(line) // there is nowhere to tell that it failed
}

// stop waits for what was logged to be written, but not for ever. What is
// logged from now on may be lost.
func (w *logWriter) stop() {
	if !w.started {
		return
	}
	close(w.quit)
	select {
	case <-w.done:
	case <-time.After(logFlush):
	}
}
