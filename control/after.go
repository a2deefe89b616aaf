// The command that runs after a snapshot was taken, or was not, whatever happened: it
// may be what thaws a guest.
//
// We may be interrupted or killed, so another process runs it: when we say so, or when
// we are gone. It stays in our session and our process group, where a command can ask
// for a password as one before the snapshot can; it takes no notice of what a
// terminal sends us both until the command runs.

package control

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
)

// afterName is what the helper is called.
const afterName = "blksnap-after"

// Afterwards is the life of that helper: it runs args[0] with sh when its input ends.
func Afterwards(args []string, in io.Reader, out io.Writer) int {
	// Not ignored: the command would ignore them as well.
	signal.Notify(make(chan os.Signal, 1), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGPIPE)
	fmt.Fprintln(out, "ready")
	<-inputEnds(in)
	cmd := exec.Command("sh", "-c", args[0])
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		fmt.Fprintln(out, exit)
		return 1
	}
	if err != nil {
		fmt.Fprintln(out, err)
		return 1
	}
	return 0
}

// runAfter sees to it that a command runs at the latest when we are gone. then runs it,
// and returns when it has ended.
func runAfter(command string) (then func() error, err error) {
	h, err := startHelper(afterName, []string{command}, nil)
	if err != nil {
		return nil, err
	}
	if h.word() != "ready" {
		return nil, fmt.Errorf("start %s: %w", afterName, h.end())
	}
	return func() error {
		h.in.Close()
		why := h.word()
		if err := h.end(); err != nil {
			return fmt.Errorf("--after %q: %s", command, cmp.Or(why, err.Error()))
		}
		return nil
	}, nil
}
