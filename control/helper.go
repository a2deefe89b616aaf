// Helpers: processes of our own that do what must be done also when we are killed.
//
// A helper is our binary under another name. It hears of our end by the end of its
// input, whatever ended us, and tells us in lines on its output.

package control

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"os/exec"
	"syscall"
)

// helpers are what our binary is under other names: they return an exit status.
var helpers = map[string]func(args []string, in io.Reader, out io.Writer) int{
	freezerName: Freezer,
	afterName:   Afterwards,
}

// Helper says whether the program was called to be a helper, and is it then: it
// returns the process's exit status.
func Helper(args []string, in io.Reader, out io.Writer) (status int, ok bool) {
	if len(args) == 0 {
		return 0, false
	}
	be, ok := helpers[args[0]]
	if !ok {
		return 0, false
	}
	return be(args[1:], in, out), true
}

// inputEnds is closed when whoever started a helper has closed its input, or is gone.
func inputEnds(in io.Reader) <-chan struct{} {
	over := make(chan struct{})
	go func() {
		io.Copy(io.Discard, in)
		close(over)
	}()
	return over
}

// helper is one at work, seen from its parent.
type helper struct {
	cmd  *exec.Cmd
	in   io.Closer
	said *bufio.Scanner
}

// startHelper starts the helper called name.
func startHelper(name string, args []string, attr *syscall.SysProcAttr) (*helper, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	h := &helper{cmd: exec.Command(self)}
	h.cmd.Args = append([]string{name}, args...)
	h.cmd.SysProcAttr = attr
	h.cmd.Stderr = os.Stderr
	in, err := h.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := h.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	h.in, h.said = in, bufio.NewScanner(out)
	if err := h.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return h, nil
}

// word is the next line that the helper says, empty when it is gone.
func (h *helper) word() string {
	if h.said.Scan() {
		return h.said.Text()
	}
	return ""
}

// end lets the helper end and waits for that.
func (h *helper) end() error {
	h.in.Close()
	return h.cmd.Wait()
}
