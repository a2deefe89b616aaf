package control

import (
	"bytes"
	"fmt"
	"strings"
	"testing"
)

// gateWriter waits at its first write until it is let through.
type gateWriter struct {
	entered, release chan struct{}
	bytes.Buffer
}

func (w *gateWriter) Write(p []byte) (int, error) {
	if w.entered != nil {
		close(w.entered)
		w.entered = nil
		<-w.release
	}
	return w.Buffer.Write(p)
}

// TestLogNeverWaits logs more than there is room for while the log's reader
// hangs.
func TestLogNeverWaits(t *testing.T) {
	w := newLogWriter()
	out := &gateWriter{entered: make(chan struct{}), release: make(chan struct{})}
	entered := out.entered
	w.start(out)
	fmt.Fprintln(w, "first")
	<-entered
	for i := range logLines + 5 {
		fmt.Fprintf(w, "line %d\n", i)
	}
	close(out.release)
	w.stop()
	text := out.String()
	if !strings.HasPrefix(text, "first\n(5 lines of the log were dropped)\nline 0\n") || !strings.HasSuffix(text, fmt.Sprintf("line %d\n", logLines-1)) {
		t.Errorf("log\n got %.80q ... %q\nwant the first line, a note of 5 dropped, and lines 0 to %d", text, text[len(text)-20:], logLines-1)
	}
}

// TestLogOfFailedStart stops a log that was never started.
func TestLogOfFailedStart(t *testing.T) {
	w := newLogWriter()
	fmt.Fprintln(w, "line")
	w.stop()
	fmt.Fprintln(w, "late line")
}
